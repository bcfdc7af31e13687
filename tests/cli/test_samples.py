"""`dspy-fst show RUN --samples N [--failed]`, and the last line of `show`: from hand-made events."""

import json

import pytest

from dspy_fst.report.samples import IN_A_LINE, sample_line
from tests.cli.conftest import invoke
from tests.cli.test_show import written
from tests.report.happenings import SEED, cycle, done, plan, step, timed

CUT = "[[ ## answer ## ]] 4 2"


def sample(reward, said="4 2", **changes):
    """A rollout as a run records it."""
    made = {
        "problem": 7,
        "candidate": "17f692373111",
        "reward": reward,
        "feedback": "Wrong. Too few values.",
        "mask": None,
        "failure": None,
        "failed_in": None,
        "tokens": 9,
        "modules": [{"name": "solve", "inputs": {"numbers": "4 2 1"}, "outputs": {"answer": said}}],
        "calls": [{"predictor": "solve", "reply": f"[[ ## answer ## ]] {said}", "cut": False}],
    }
    return made | changes


UNPARSED = sample(
    0.0,
    failure="parse",
    failed_in="solve",
    feedback="The reply could not be parsed: no answer",
    modules=[{"name": "solve", "inputs": {"numbers": "4 2 1"}, "reply": "four two"}],
    calls=[{"predictor": "solve", "reply": "four two", "cut": True}],
)
MASKED = sample(None, mask="timeout", modules=[], feedback="")


def run_with(path, *samples, **config):
    events = [plan(**config)]
    for at, of in enumerate(samples):
        events += [step(at, 0.5), {"event": "trajectories", "step": at, "rollouts": of}]
    return written(path, timed(events))


def test_samples_show_the_predictor_the_candidate_the_reward_and_the_reason(tmp_path):
    text = invoke("show", run_with(tmp_path / "run", [sample(0.25), UNPARSED]), "--samples", 2).stdout
    assert "run: 2 of 2 recorded samples" in text
    assert "step 0, problem 7, candidate 17f692373111: reward 0.250" in text
    assert "solve(numbers='4 2 1')" in text
    assert "answer: 4 2" in text
    assert "sampled by solve: [[ ## answer ## ]] 4 2" in text
    assert "why: Wrong. Too few values." in text
    assert "reward 0.000, failed: parse in solve" in text
    assert "reply that did not parse: four two" in text
    assert "why: The reply could not be parsed: no answer" in text


def test_the_newest_come_last_and_only_failed_ones_where_these_are_wanted(tmp_path):
    path = run_with(tmp_path / "run", [sample(0.1), UNPARSED], [sample(0.2), MASKED], [sample(0.3)])
    heads = [line for line in invoke("show", path, "--samples", 2).stdout.splitlines() if line.startswith("step")]
    assert [head.split(":")[1].strip() for head in heads] == ["reward –, masked", "reward 0.300"]  # noqa: RUF001
    text = invoke("show", path, "--samples", 9, "--failed").stdout
    assert "2 of 5 recorded samples, those that failed or were masked" in text
    assert "masked: timeout" in text
    assert "reward 0.300" not in text
    shown = json.loads(invoke("show", path, "--failed", "--json").stdout)
    assert [(one["step"], one["failure"], one["mask"]) for one in shown["samples"]] == [
        (0, "parse", None),
        (1, None, "timeout"),
    ]
    assert shown["recorded"] == 5


def test_samples_of_searches_say_which_search_and_candidate(tmp_path):
    searched = {"event": "search_samples", "cycle": 1, "rollouts": [sample(0.75, calls=[], tokens=None), UNPARSED]}
    events = [plan(), step(0, 0.5), {"event": "trajectories", "step": 0, "rollouts": [sample(0.1)]}, searched]
    path = written(tmp_path / "run", timed(events))
    text = invoke("show", path, "--samples", 2).stdout
    assert "run: 2 of 3 recorded samples" in text
    assert "search of cycle 1, problem 7, candidate 17f692373111: reward 0.750" in text
    assert "reply that did not parse: four two" in text
    shown = json.loads(invoke("show", path, "--samples", 3, "--json").stdout)["samples"]
    assert [(one["step"], one["search"], one["reward"]) for one in shown] == [
        (0, None, 0.1),
        (None, 1, 0.75),
        (None, 1, 0.0),
    ]


def test_a_search_of_a_release_that_kept_none_says_so(tmp_path):
    events = [plan(), cycle(0, {SEED: 0.25}, {}, [SEED])]
    said = "recorded no replies: no step is done, and its release kept none of searches"
    assert said in invoke("show", written(tmp_path / "run", timed(events)), "--samples", 3).stdout


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"recorded_samples": 0}, "recorded no replies: recorded_samples is 0 in its recipe; set it to 4 or so"),
        ({"method": "gepa"}, "recorded no replies: no search and no step is done"),
    ],
    ids=["switched off", "without a search"],
)
def test_a_run_that_recorded_no_replies_says_so_and_names_the_setting(tmp_path, made, said):
    path = run_with(tmp_path / "run", **made)
    assert said in invoke("show", path, "--samples", 3).stdout


def test_a_run_none_of_whose_samples_failed_says_so(tmp_path):
    text = invoke("show", run_with(tmp_path / "run", [sample(1.0)]), "--failed").stdout
    assert "none of its 1 recorded samples failed or was masked; leave out --failed" in text


def test_samples_of_an_older_release_have_no_calls(tmp_path):
    old = {name: value for name, value in UNPARSED.items() if name not in ("calls", "failed_in")}
    text = invoke("show", run_with(tmp_path / "run", [old]), "--samples", 1).stdout
    assert "reply that did not parse: four two" in text


def test_a_reply_cannot_command_the_terminal(tmp_path):
    hostile = sample(0.1, said="\x1b[2J\x07 [bold]x")
    text = invoke("show", run_with(tmp_path / "run", [hostile]), "--samples", 1).stdout
    assert "\x1b" not in text
    assert "[bold]x" in text


def test_a_sample_on_one_line_is_bounded_and_says_who_what_and_why():
    line = sample_line(sample(0.25, said="4\n2 " * 500, feedback="Wrong. " * 500))
    assert line.startswith("solve under 17f692373111, problem 7, reward 0.250: '[[ ## answer ## ]] 4 2 4 2")
    assert len(line) < 2 * IN_A_LINE + 100
    assert "\n" not in line
    assert sample_line(MASKED | {"calls": []}).startswith("? under 17f692373111, problem 7, masked: timeout")
    assert "'four two'; The reply could not be parsed" in sample_line(UNPARSED)


def test_the_first_and_the_last_line_of_a_run_that_trained_nothing_say_so(tmp_path):
    counts = {"flat_groups": 4, "live_groups": 0, "rollouts": 32, "failed: parse": 32}
    flat = step(0, 0.0, tokens=0, rows=0)
    flat["report"]["counts"] |= counts
    path = written(tmp_path / "run", timed([plan(), flat, done([SEED], [0.0], {})]))
    lines = [line for line in invoke("show", path).stdout.splitlines() if line.strip()]
    assert "no update changed the weights: nothing parsed: 100% of the rollouts" in lines[0]
    assert lines[-1].startswith("no update changed the weights: nothing parsed")
    assert json.loads(invoke("show", path, "--json").stdout)["ending"].startswith("no update changed the weights")
