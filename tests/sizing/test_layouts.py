"""Layouts of cards and rates by arithmetic: formulas by hand, more cards are never slower, and what does not fit."""

from dataclasses import replace

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.engine.options import make_settings
from dspy_fst.engine.vllm.fleet.placing import cards_of, cards_of_one, fleet_faults
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import ConfigurationError
from dspy_fst.memory import Workload
from dspy_fst.memory.bytes_by_part import VLLM_WORKINGS, served_bytes, trainer_parts
from dspy_fst.memory.shape import ModelSize
from dspy_fst.preflight.cluster_checks import rank_faults
from dspy_fst.sizing import CARDS, Asked, Lengths, Texts, best_forecast, card_named
from dspy_fst.sizing.from_card import engine_rates, link_seconds, moved_bytes, published_bytes, rates_of_card
from dspy_fst.sizing.launching import command_for, sections_for
from dspy_fst.sizing.layout import Layout, TrainerShare, layouts, trainer_share
from dspy_fst.sizing.machine import (
    LINK_SHARE,
    LOCAL_READ,
    LOCAL_WRITE,
    NETWORK,
    PROMPT_SHARE,
    READ_SHARE,
    SHARED_STORAGE,
    STEP_S,
    UPDATE_SHARE,
)

GIB = 2**30
H100 = CARDS["h100"]
EIGHT = Workload(
    "8B",
    ModelSize(
        parameters=8_190_735_360,
        untied=8_190_735_360,
        vocabulary=151_936,
        width=4096,
        inner_width=12_288,
        layers=36,
        queries=4096,
        keys=1024,
        heads=32,
        normed_heads=True,
        linear=(("q_proj", 36 * 8192),),
    ),
    "vllm",
)
"""Qwen3-8B's shape."""
TEXTS = Texts(Lengths.around(256), prompt=512)
FULL, LORA = FSTConfig(), FSTConfig.model_validate({"adapter": "lora"})
PLAIN = FSTConfig(kl_coefficient=0)
"""Without a reference."""
SHARE = TrainerShare(held=0, peak=0, micro_batch_tokens=1000, recompute=False)


def layout(**changes):
    return Layout(**{"trainers": 1, "engines": 1, "group": 1, "trainer": SHARE, "served": 0, "cache": GIB, **changes})


# ---- formulas --------------------------------------------------------------------------------------


def test_a_decoding_step_reads_the_weights_once_and_each_row_s_keys():
    size = EIGHT.size
    rates = engine_rates(H100, layout(), size, TEXTS)
    read = 2 * (size.parameters - 151_936 * 4096)  # the embedding is looked up, the head multiplied with
    assert rates.step_s == pytest.approx(read / (3.35e12 * READ_SHARE) + STEP_S)
    keys = 2 * (2 * 36 * 1024) * (512 + 128)
    work = 2 * size.parameters / (989e12 * PROMPT_SHARE)
    assert rates.row_s == pytest.approx(keys / (3.35e12 * READ_SHARE) + work)
    assert rates.prompt_s == pytest.approx(work)
    assert rates.rows == GIB // (2 * 2 * 36 * 1024 * 768)


def test_an_engine_of_four_cards_divides_all_but_the_step_s_own_time():
    one, four = (engine_rates(H100, layout(group=group), EIGHT.size, TEXTS) for group in (1, 4))
    assert four.row_s == pytest.approx(one.row_s / 4)
    assert four.step_s == pytest.approx((one.step_s - STEP_S) / 4 + STEP_S + 2 * 36 * 10e-6)


@pytest.mark.parametrize(("config", "recompute", "passes"), [(FULL, False, 6), (FULL, True, 8), (LORA, False, 4)])
def test_an_update_s_operations_are_those_of_its_passes(config, recompute, passes):
    share = TrainerShare(0, 0, 1000, recompute)
    rates = rates_of_card(H100, layout(trainer=share), EIGHT, config, TEXTS, 5000)
    assert rates.update_token_s == pytest.approx(passes * 8_190_735_360 / (989e12 * UPDATE_SHARE))


def test_links_are_busy_once_a_micro_batch_and_slower_between_machines():
    moved = 3 * 4 * 8_190_735_360  # float32: gathered forward and backward, gradients summed
    assert link_seconds(H100, layout(), EIGHT, PLAIN, 5000) == 0
    within = link_seconds(H100, layout(trainers=2), EIGHT, PLAIN, 5000)  # 3 micro-batches of 2 x 1,000 tokens
    assert within == pytest.approx(3 * moved * 0.5 / (450e9 * LINK_SHARE))
    between = link_seconds(H100, layout(trainers=16), EIGHT, PLAIN, 5000)
    assert between == pytest.approx(moved * 15 / 16 / (NETWORK * LINK_SHARE))


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [({}, 6), ({"kl_coefficient": 0.1}, 7 + 2 * 2 * 151_936 * 4096 / (2 * 8_190_735_360)), ({"adapter": "lora"}, 2)],
)
def test_what_moves_is_what_the_shares_are_kept_in(recipe, passes):
    """In passes of 2 P bytes: float32 is two; the KL's reference one, and its embedding and head two."""
    config = FSTConfig.model_validate({"kl_coefficient": 0, "seed_kl_coefficient": 0, **recipe})
    assert moved_bytes(EIGHT, config) == pytest.approx(passes * 2 * 8_190_735_360, rel=2e-3)


def test_links_that_take_longer_than_the_cards_are_waited_for():
    slow = rates_of_card(H100, layout(trainers=16), EIGHT, FULL, TEXTS, 100)
    links = link_seconds(H100, layout(trainers=16), EIGHT, FULL, 100)
    assert slow.update_s + 100 * slow.update_token_s >= links


def test_a_publish_is_written_once_and_read_by_every_machine():
    bytes_ = published_bytes(EIGHT, FULL)
    assert bytes_ == 2 * 8_190_735_360
    one = rates_of_card(H100, layout(), EIGHT, FULL, TEXTS, 0)
    assert one.publish_s == pytest.approx(bytes_ / LOCAL_WRITE + bytes_ / LOCAL_READ)
    four = rates_of_card(H100, layout(trainers=8, engines=24), EIGHT, FULL, TEXTS, 0)
    assert four.publish_s == pytest.approx((1 + 3) * bytes_ / SHARED_STORAGE)  # the trainer's machine reads nothing
    mixed = rates_of_card(H100, layout(trainers=4, engines=12), EIGHT, FULL, TEXTS, 0)
    assert mixed.publish_s == pytest.approx((1 + 2) * bytes_ / SHARED_STORAGE)
    assert published_bytes(EIGHT, LORA) == 4 * 16 * 36 * 8192


# ---- layouts ---------------------------------------------------------------------------------------


def test_every_layout_has_room_for_what_each_of_its_cards_holds():
    found = layouts(EIGHT, FULL, H100, 8)
    assert all(one.cards <= 8 for one in found)
    assert (
        min(one.trainers for one in found) == 4
    )  # 140 GiB to divide; on each what is put together, and an update's own
    for one in found:
        parts = trainer_parts(replace(EIGHT, ranks=one.trainers), FULL, on_gpu=True)  # what a rank of a run holds
        assert one.trainer.held == sum(parts.values())
        assert one.trainer.held + one.trainer.peak <= 79 * GIB - GIB // 2
        assert one.served == -(-served_bytes(EIGHT, FULL) // one.group) + VLLM_WORKINGS
        assert one.served + one.cache <= 0.95 * 79 * GIB


def test_more_trainer_cards_hold_less_each_and_take_larger_micro_batches():
    shares = [trainer_share(EIGHT, FULL, H100, count) for count in (4, 8, 16)]
    assert [share.held for share in shares] == sorted((share.held for share in shares), reverse=True)
    tokens = [share.micro_batch_tokens for share in shares]
    assert tokens == sorted(tokens)
    assert trainer_share(EIGHT, FULL, H100, 1) is None


@pytest.mark.parametrize("other", [{"adapter": "lora", "quantized_base": "nf4"}, {"optimizer": "adamw_8bit"}])
def test_what_fsdp_cannot_share_out_is_trained_on_one_card(other):
    config = FSTConfig.model_validate(other)
    with pytest.raises(ValueError, match="shares out"):
        FSTConfig.model_validate({**other, "sharding": "fsdp"})
    assert {one.trainers for one in layouts(EIGHT, config, CARDS["b200"], 8)} == {1}


@pytest.mark.parametrize(("heads", "of_keys", "groups"), [(28, 4, {1, 2, 4}), (9, 3, {1}), (16, 2, {1, 2, 4, 8})])
def test_the_cards_of_an_engine_divide_the_heads_of_the_model(heads, of_keys, groups):
    size = replace(EIGHT.size, heads=heads, queries=heads * 128, keys=of_keys * 128)
    assert {one.group for one in layouts(replace(EIGHT, size=size), FULL, H100, 16)} == groups


def test_a_trainer_has_no_more_cards_than_a_step_has_rollouts():
    assert layouts(EIGHT, FULL, H100, 100_000) == layouts(EIGHT, FULL, H100, 2048)
    few = FULL.model_copy(update={"problems_per_step": 2})
    assert max(one.trainers for one in layouts(EIGHT, few, H100, 64)) == 2 * FULL.rollouts_per_problem


@pytest.mark.parametrize("place", [(1, 1, 1), (4, 1, 4), (4, 2, 2), (2, 3, 2)])
def test_what_is_told_to_run_a_layout_on_one_machine_is_accepted_by_recipe_and_engine(place, monkeypatch):
    monkeypatch.setattr("dspy_fst.engine.vllm.fleet.placing.gpu_count", lambda: 8)
    trainers, engines, group = place
    chosen = layout(trainers=trainers, engines=engines, group=group, served=50 * GIB)
    sections = sections_for(chosen, H100)
    assert FSTConfig.model_validate(sections.get("recipe", {})).sharding == (None if trainers == 1 else "fsdp")
    given = make_settings(VLLMSettings, sections["policy"]["engine_options"], "vllm")
    assert fleet_faults(given) == []
    assert [card for cards in cards_of(given) for card in cards] == list(range(trainers, chosen.cards))
    assert given.gpu_memory_utilization == 0.64
    launcher = "dspy-fst" if trainers == 1 else f"torchrun --nproc-per-node {trainers} -m dspy_fst.cli"
    assert command_for(chosen, "my project.yaml") == f"{launcher} run 'my project.yaml'"


@pytest.mark.parametrize("trainers", [1, 16])
def test_on_several_machines_ray_places_servers_and_trainer_ranks(trainers):
    chosen = layout(trainers=trainers, engines=2, group=8, served=50 * GIB)
    sections = sections_for(chosen, H100)
    recipe = FSTConfig.model_validate(sections["recipe"])
    assert (recipe.ray, recipe.ranks, recipe.sharding) == ("auto", trainers, None if trainers == 1 else "fsdp")
    assert list(rank_faults(recipe)) == []
    given = make_settings(VLLMSettings, sections["policy"]["engine_options"], "vllm")
    assert fleet_faults(given) == []
    assert (given.on_ray, given.servers, cards_of_one(given.extra_args)) == (True, 2, 8)
    assert command_for(chosen, "my project.yaml") == "dspy-fst run 'my project.yaml'"


def test_texts_whose_keys_and_values_have_room_nowhere_are_refused():
    asked = Asked(FSTConfig.model_validate({"adapter": "lora", "cycles": 1}), Texts(Lengths.around(256), 9e6))
    with pytest.raises(ConfigurationError, match=r"a text of 9,000,256 tokens .* no room .* on any layout of 8 x h100"):
        best_forecast(asked, EIGHT, H100, 8)


def test_one_card_may_hold_trainer_and_engine():
    (alone,) = layouts(EIGHT, LORA, H100, 1)
    assert alone.shared
    assert alone.cards == 1
    with pytest.raises(ConfigurationError):
        layouts(EIGHT, FULL, H100, 1)


def test_what_fits_on_no_card_says_what_is_missing_and_what_to_do():
    with pytest.raises(ConfigurationError) as raised:
        layouts(EIGHT, FULL, card_named("rtx4090"), 2)
    (fault,) = raised.value.faults
    assert "8B and its recipe fit on no layout of 2 x rtx4090" in fault
    assert "a card has 23.0 GiB" in fault
    assert "more --cards, a larger --card, adapter: lora in the recipe, or a smaller model" in fault


def test_an_unknown_card_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="'h1000' is not known; known cards: l4, rtx4090, l40s, a100, h100"):
        card_named("h1000")
    assert card_named("RTX 4090") is card_named("rtx-4090")


# ---- forecasts -------------------------------------------------------------------------------------

QUICK = {"cycles": 1, "steps_per_cycle": 2, "problems_per_step": 8, "anchors": 8, "search_rollouts": 30}


@pytest.mark.parametrize("recipe", [{}, {"adapter": "lora"}, {"num_threads": 8}, {"method": "rl"}])
def test_more_cards_are_never_slower(recipe):
    asked = Asked(FSTConfig.model_validate({**QUICK, **recipe}), TEXTS, valset=4)
    times = [best_forecast(asked, EIGHT, H100, cards).run_s for cards in (6, 7, 8, 12, 16, 64)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


def test_the_layout_that_is_told_is_the_quickest_of_all(monkeypatch):
    asked = Asked(FSTConfig.model_validate(QUICK), TEXTS)
    pruned = best_forecast(asked, EIGHT, H100, 16)
    monkeypatch.setattr("dspy_fst.sizing.forecasting._at_least", lambda *_: 0.0)  # every layout is simulated
    assert best_forecast(asked, EIGHT, H100, 16).run_s == pruned.run_s


def test_a_faster_card_is_never_slower():
    asked = Asked(FSTConfig.model_validate({**QUICK, "adapter": "lora"}), TEXTS)
    a100, h100 = (best_forecast(asked, EIGHT, CARDS[name], 4).run_s for name in ("a100", "h100"))
    assert h100 < a100
