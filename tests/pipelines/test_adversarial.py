"""Programs, metrics and problems that misbehave: the run counts why and goes on, or refuses before it starts."""

import json
import math
import threading
import zlib
from collections import Counter

import dspy
import pytest
from safetensors.torch import load_file, save_file

from dspy_fst.errors import ConfigurationError
from programs.lab import BASE
from programs.lab.tokenizer import END, fixed_pieces, signature
from tests.pipelines.watched import (
    assert_tokens_are_exact,
    lab_policy,
    outcomes_in,
    run_watched,
    says,
    shorter,
    tokenizer,
)

WORK, SOLVE = "Work out the answer from the numbers.", "Solve the problem."
GOOD = ("1 2 3 4", "2 7 1 8", "3 1 4 1", "4 6 6 9", "5 0 2 0", "6 0 2 2")
"""The preflight plays the first four problems, so that what is bad is met in the run alone."""
EACH = 2
"""Rollouts of a problem in the one step."""
STUCK_S = 8.0
"""Seconds until a stuck rollout is given up; the others must end in that time on a busy machine, too."""
LET_GO = threading.Event()
"""Ends what hangs when its test is over."""


def problems(bad):
    return [dspy.Example(numbers=numbers, answer="1").with_inputs("numbers") for numbers in (*GOOD, *bad)]


def compile_all(program, tmp_path, *, metric=shorter, bad=(), **recipe):
    """Every problem is in the one step; the search begins with the first four."""
    if program.get_lm() is None:
        program.set_lm(lab_policy(linger_s=0.2))
    everything = {"problems_per_step": len(GOOD) + len(bad), "group_size": EACH, "anchors": 4, "search_rollouts": 6}
    trainset = problems(bad)
    return run_watched(program, tmp_path / "run", metric=metric, trainset=trainset, **{**everything, **recipe})


def assert_counted(run, reasons=()):
    """Rollouts of good problems are scored, those of each bad one end as expected, and the reports count them so."""
    (step,) = run.reports("step")
    expected = Counter({"scored": EACH * len(GOOD)})
    for reason in reasons:
        expected[reason] += EACH
    assert run.outcomes("step") == expected
    assert outcomes_in(step["counts"]) == outcomes_in(expected)
    for cycle in run.reports("cycle"):
        assert outcomes_in(cycle["counts"]) == outcomes_in(run.outcomes("search"))
    assert run.compiled._compiled


class Asks(dspy.Module):
    """One predictor; what happens before it is asked and what becomes of its answer can be given."""

    def __init__(self, before=lambda numbers: numbers, after=lambda pred, numbers: pred):
        super().__init__()
        self.before, self.after = before, after
        self.solve = says(WORK)

    def forward(self, numbers):
        return self.after(self.solve(numbers=self.before(numbers)), numbers)


def with_function(pred, numbers):
    return dspy.Prediction(answer=pred.answer, check=lambda: numbers, themselves={pred})


class Never(Asks):
    """Has a predictor that is never called."""

    def __init__(self):
        super().__init__()
        self.unused = says(SOLVE)


class TwoNames(Asks):
    """Has one predictor under two names."""

    def __init__(self):
        super().__init__()
        self.alias = self.solve

    def forward(self, numbers):
        return self.alias(numbers=self.solve(numbers=numbers).answer)


def without_end():
    return without_end()


class Spoilt(Asks):
    """Goes wrong in another way with each bad problem."""

    def forward(self, numbers):
        if numbers == "9 0":
            return 1 // 0
        if numbers == "9 1":
            numbers = numbers * 600
        said = self.solve(numbers=numbers)
        if numbers == "9 2":
            return 1 // 0
        if numbers == "9 3":
            return without_end()
        if numbers == "9 4":
            raise ConnectionError("the tool is down")
        return said


SPOILT = {
    "9 0": "masked: program: ZeroDivisionError",
    "9 1": "failed: context",
    "9 2": "failed: ZeroDivisionError",
    "9 3": "failed: RecursionError",
    "9 4": "masked: outage: ConnectionError",
    "9 \ud800": "masked: program: ValueError",
}
"""What becomes of a problem: half a surrogate pair cannot be sent to any LM."""


def test_a_program_that_fails_is_scored_or_masked_with_its_reason_and_the_run_goes_on(tmp_path):
    run = compile_all(Spoilt(), tmp_path, bad=tuple(SPOILT))
    assert_counted(run, SPOILT.values())
    assert_tokens_are_exact(run)
    reasons = {
        rollout.problem - len(GOOD): rollout.mask or rollout.failure
        for rollout in run.played("step")
        if rollout.reward is None or rollout.failure
    }
    assert [reasons[nth] for nth in range(len(SPOILT))] == [text.split(": ", 1)[1] for text in SPOILT.values()]


ODD = {
    "gives what cannot be serialised": lambda: Asks(after=with_function),
    "has a module that is never called": Never,
    "has one predictor under two names": TwoNames,
}


@pytest.mark.parametrize("name", ODD)
def test_a_program_that_is_odd_is_trained_like_any_other(name, tmp_path):
    run = compile_all(ODD[name](), tmp_path)
    assert_counted(run)
    assert {row.predictor for row in run.rows} == {"solve"}
    assert_tokens_are_exact(run)


RETURNED = {
    "9 0": (math.nan, "masked: metric returned nan"),
    "9 1": (-math.inf, "masked: metric returned -inf"),
    "9 2": (None, "masked: metric returned NoneType"),
    "9 3": ("good", "masked: metric returned str"),
    "9 4": ({"feedback": "no score"}, "masked: metric returned dict"),
    "9 5": (ZeroDivisionError(), "masked: metric raised ZeroDivisionError"),
    "9 6": (7.0, 7.0),
    "9 7": (-3, -3.0),
    "9 8": (True, 1.0),
    "9 9": ("0.25", 0.25),
}
"""What a metric gives for a problem -> why it measures nothing, or the reward."""


def test_a_metric_gives_a_reward_as_it_is_or_masks_with_its_reason(tmp_path):
    def metric(gold, pred, trace=None):
        returned, _ = RETURNED.get(gold.numbers, (shorter(gold, pred), None))
        if isinstance(returned, Exception):
            raise returned
        return returned

    run = compile_all(Asks(), tmp_path, metric=metric, bad=tuple(RETURNED), method="rl")
    masks = {reason: EACH for _, reason in RETURNED.values() if isinstance(reason, str)}
    rewards = {len(GOOD) + i: right for i, (_, right) in enumerate(RETURNED.values()) if isinstance(right, float)}
    assert run.outcomes("step") == {"scored": EACH * (len(GOOD) + len(rewards)), **masks}
    assert outcomes_in(run.reports("step")[0]["counts"]) == masks
    for rollout in run.played("step"):
        assert rollout.problem not in rewards or (rollout.reward, type(rollout.reward)) == (
            rewards[rollout.problem],
            float,
        )
    assert not {row.problem for row in run.rows} & set(range(len(GOOD), len(GOOD) + len(masks)))


class Stuck(Asks):
    """Never has enough of one bad problem, and waits for ever with another."""

    def forward(self, numbers):
        while numbers == "9 0":
            self.solve(numbers=numbers)
        if numbers == "9 1":
            LET_GO.wait(60)
        return self.solve(numbers=numbers)


@pytest.mark.slow
def test_calls_without_end_and_a_tool_or_a_metric_that_hangs_are_given_up_and_the_run_goes_on(tmp_path):
    def metric(gold, pred, trace=None):
        if gold.numbers == "9 2":
            LET_GO.wait(60)
        return shorter(gold, pred)

    LET_GO.clear()
    try:
        bad = ("9 0", "9 1", "9 2")
        run = compile_all(Stuck(), tmp_path, metric=metric, bad=bad, method="rl", rollout_timeout_s=STUCK_S)
    finally:
        LET_GO.set()
    assert_counted(run, ["masked: timeout"] * 3)


class TwoHundred(dspy.Module):
    """Calls its predictor 200 times on a bad problem."""

    def __init__(self):
        super().__init__()
        self.solve = says(WORK, max_tokens=2)

    def forward(self, numbers):
        for _ in range(199 if numbers == "9 0" else 0):
            self.solve(numbers=numbers)
        return self.solve(numbers=numbers)


def test_two_hundred_calls_in_one_rollout_are_all_learnt_from(tmp_path):
    def never_flat(gold, pred, trace):
        return zlib.crc32(repr([said.answer for _, _, said in trace]).encode()) / 2**32

    run = compile_all(TwoHundred(), tmp_path, metric=never_flat, bad=("9 0",), method="rl")
    assert run.outcomes("step") == {"scored": EACH * (len(GOOD) + 1)}
    assert Counter(len(rollout.calls) for rollout in run.played("step")) == {200: EACH, 1: EACH * len(GOOD)}
    assert Counter(row.problem for row in run.rows)[len(GOOD)] == EACH * 200
    assert_tokens_are_exact(run)


WRITINGS = (
    *("9 🙂👩‍👩‍👧 1", "9 🏳️‍🌈"),
    *("9 שלום ١٢٣", "9 \u202eabc\u202c"),
    *("9 \x00\x1b[31m 1", "9 \r\n\t"),
    *("9 <|end|><|assistant|> 1", "9 [[ ## answer ## ]]\n1"),
)
"""Emoji; right to left; control codes; the marks of the chat template and of the adapter."""


def test_any_writing_is_played_its_tokens_are_exact_and_the_log_reads_back(tmp_path):
    run = compile_all(Asks(), tmp_path, bad=WRITINGS, anchors=None)
    assert run.outcomes("step").keys() <= {"scored", "failed: parse"}
    assert run.outcomes("step").total() == EACH * (len(GOOD) + len(WRITINGS))
    assert_tokens_are_exact(run)
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines].count("step") == 1


def hasty_model(folder):
    """The base model with one change: it ends at once as readily as it starts to answer, and never ends later."""
    for path in BASE.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(BASE / "model.safetensors")
    opening = next(piece for piece in fixed_pieces() if piece.startswith("[[ ## answer ## ]]"))
    start, end = tokenizer().convert_tokens_to_ids([opening, END])
    weights["lm_head.weight"][end] = weights["lm_head.weight"][start]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_empty_replies_fail_and_replies_over_the_limit_are_counted_and_both_are_learnt_from(tmp_path):
    (tmp_path / "hasty").mkdir()
    program = Asks()
    program.set_lm(lab_policy(hasty_model(tmp_path / "hasty"), linger_s=0.2))
    run = compile_all(program, tmp_path)
    end = tokenizer().eos_token_id
    replies = Counter(
        "empty" if call.completion_ids == (end,) else call.finish_reason
        for rollout in run.played("step")
        for call in rollout.calls
    )
    (step,) = run.reports("step")
    assert replies["empty"] > 0
    assert replies["length"] > 0
    assert run.outcomes("step")["failed: parse"] == step["counts"]["failed: parse"] >= replies["empty"]
    assert step["counts"]["truncated_calls"] == replies["length"]
    assert {len(row.completion_ids) for row in run.rows} >= {1, 16}
    assert_tokens_are_exact(run)


REFUSED = {
    "crashes before it speaks": (
        lambda: Asks(before=lambda numbers: str(1 // 0)),
        shorter,
        r"4 of the first 4 .* \(program: ZeroDivisionError\).*run the program on one example by hand",
    ),
    "gives a text where the metric expects fields": (
        lambda: Asks(after=lambda pred, numbers: pred.answer),
        shorter,
        r"4 of the first 4 .* \(metric raised AttributeError\).*'str' object has no attribute 'answer'",
    ),
    "metric gives nan": (Asks, lambda g, p, t=None: math.nan, r"4 of the first 4 .* \(metric returned nan\)"),
    "metric gives none": (Asks, lambda g, p, t=None: None, r"4 of the first 4 .* \(metric returned NoneType\)"),
    "metric fails once": (
        Asks,
        lambda gold, pred, trace=None: 1 / (gold.numbers != GOOD[3]),
        r"1 of the first 4 .* \(metric raised ZeroDivisionError\).*mend the metric",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_never_measures_is_refused_before_the_run(name, tmp_path):
    make, metric, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=message):
        compile_all(make(), tmp_path, metric=metric)


def test_what_never_ends_is_refused_before_the_run(tmp_path):
    LET_GO.clear()
    program = Asks(before=lambda numbers: LET_GO.wait(60) or numbers)
    try:
        with pytest.raises(ConfigurationError, match=r"\(timeout\); raise rollout_timeout_s"):
            compile_all(program, tmp_path, rollout_timeout_s=1.0)
    finally:
        LET_GO.set()


def test_a_program_that_exits_is_counted_and_the_run_goes_on(tmp_path):
    def leaves(pred, numbers):
        if numbers == "9 0":
            raise SystemExit(2)  # argparse in a tool, or exit() in code that the model wrote
        return pred

    run = compile_all(Asks(after=leaves), tmp_path, bad=("9 0",), method="rl")
    assert_counted(run, ["failed: SystemExit"])


def test_best_of_n_without_one_reply_that_parses_is_the_policy_s_failure(tmp_path):
    hard = dspy.ChainOfThought(signature(WORK))
    best = dspy.BestOfN(hard, N=2, reward_fn=lambda inputs, pred: 0.0, threshold=1.0)
    run = compile_all(best, tmp_path, method="rl")
    assert all(reason.startswith("failed: ") for reason in run.outcomes("step"))
