"""What is written is what is read, for any content."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_fst.fast.pareto import top_k
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.files import population_from_json, population_to_json, to_jsonable
from dspy_fst.run.search_journal import Journal
from dspy_fst.slow.checkpoint import read_state, write_state
from dspy_fst.slow.credit import credit
from dspy_fst.types import Candidate, Population
from tests.slow.makers import make_group

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
candidates = st.builds(Candidate, st.dictionaries(texts, texts, min_size=1, max_size=3))
scores = st.none() | st.floats(-1, 1)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def populations(draw):
    members = draw(st.lists(candidates, min_size=1, max_size=4))
    return Population(
        members=tuple(members),
        scores=tuple(draw(scores) for _ in members),
        parents={member.digest: tuple(draw(st.lists(texts, max_size=2))) for member in members},
    )


@st.composite
def tensors(draw):
    kind = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return torch.randint(0, 2**40, shape).view(shape).to(kind) * draw(st.integers(0, 3))


@quick
@given(populations(), values)
def test_a_state_gives_back_what_was_committed(population, value):
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run", {"seed": 1})
        run.emit("note", text=value)
        run.commit(None, step=3, population=population, value=value)
        run.close()
        again = RunDirectory(Path(folder) / "run", {"seed": 1})
        again.close()
    assert population_from_json(again.state["population"]) == population
    assert again.state["value"] == to_jsonable(value)


@quick
@given(
    st.lists(st.tuples(st.sampled_from(["rollouts", "reflection"]), texts, st.dictionaries(texts, values)), max_size=5)
)
def test_a_journal_recalls_what_was_recorded_in_order(acts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.jsonl"
        journal = Journal(path, {"cycle": 0})
        for kind, key, gave in acts:
            assert journal.recall(kind, key) is None
            journal.record(kind, key, gave)
        again = Journal(path, {"cycle": 0})
        assert [again.recall(kind, key) for kind, key, _ in acts] == [gave for _, _, gave in acts]
        assert again.recall("rollouts", "next") is None


@quick
@given(st.dictionaries(texts.filter(bool), tensors(), max_size=4), st.integers(0, 2**40))
def test_a_trainer_s_state_is_read_bit_for_bit(named, updates):
    named = {f"weights/{name}": tensor for name, tensor in named.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder) / "trainer", named, {"updates": updates})
        found, facts = read_state(Path(folder) / "trainer", {})
        assert facts["updates"] == updates
        assert found.keys() == named.keys()
        for name, tensor in named.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@quick
@given(populations())
def test_a_population_survives_json(population):
    assert population_from_json(population_to_json(population)) == population


@quick
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=2, max_size=6), min_size=1, max_size=4),
    st.floats(-5, 5),
)
def test_credit_sees_differences_of_rewards_only(groups, shift):
    """Rewards moved by a constant, or problems in another order, teach the same."""

    def learnt(rewards, order=1):
        made = [make_group(*row, problem=index) for index, row in enumerate(rewards)][::order]
        rows = credit(made).rows
        return sorted((row.problem, round(row.advantage, 3), round(row.token_weight, 9)) for row in rows)

    moved = [[None if reward is None else reward + shift for reward in row] for row in groups]
    assert learnt(moved) == learnt(groups) == learnt(groups, order=-1)


@quick
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=5), st.data())
def test_a_copy_of_a_candidate_adds_nothing_to_what_a_population_covers(table, data):
    copied = [*table, data.draw(st.sampled_from(table))]

    def covered(rows):
        chosen = top_k(rows, 2)
        return [max(rows[c][anchor] for c in chosen) for anchor in range(3)]

    assert covered(copied) == covered(table)
