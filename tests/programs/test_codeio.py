"""CodeIO: the comparison of values, the generated programs, the sandbox that runs them."""

import ast
import time
from pathlib import Path

import dspy
import pytest
from dspy.utils import DummyLM

from programs.codeio import build
from programs.codeio.data import outputs, public_example
from programs.codeio.program import metric
from programs.codeio.sandbox import Limits, run


def judged(want: str, got: str) -> tuple[float, str]:
    verdict = metric(dspy.Example(output=want), dspy.Prediction(output=got))
    return verdict.score, verdict.feedback


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ("[1, 2]", "[1,2]"),
        ("{'a': 1, 'b': 2}", '{"b": 2, "a": 1}'),
        ("'x y'", '"x y"'),
        ("True", "true"),
        ("None", "null"),
        ("3", "3.0"),
        ("0.30000000000000004", "0.3"),
        ("[1]", "```python\n[1]\n```"),
        ("<object>", "<object>"),  # no literal: the text counts
    ],
)
def test_the_same_value_scores_however_it_is_written(want: str, got: str) -> None:
    assert judged(want, got) == (1.0, "Correct.")


@pytest.mark.parametrize(
    ("want", "got", "fault"),
    [
        ("[1, 2, 3]", "[1, 5, 3]", "at [1] is 5; expected 2"),
        ("[1, 2]", "[1]", "has 1 elements; expected 2"),
        ("[[1], [2, 3]]", "[[1], [2, 4]]", "at [1][1] is 4; expected 3"),
        ("{'a': 1}", "{'b': 1}", "lacks the key 'a'"),
        ("{'a': 1}", "{'a': 1, 'b': 2}", "has the key 'b', which does not belong there"),
        ("{'a': [1]}", "{'a': [2]}", "at ['a'][0] is 2; expected 1"),
        ("(1, 2)", "[1, 2]", "of type list; expected (1, 2), of type tuple"),
        ("1", "True", "of type bool"),
        ("'abc'", "'abd'", "is 'abd'; expected 'abc'"),
        ("[1]", "It returns [1].", "not a Python value"),
        ("[1]", "", "not a Python value"),
        ("[1]", "(" * 500, "not a Python value"),
        ("[1]", "-" * 9000 + "1", "not a Python value"),
        ("[1]", "[" * 20_000, "not a Python value"),
        ("<object>", "other", "Expected <object>, got other"),
    ],
)
def test_feedback_says_the_difference(want: str, got: str, fault: str) -> None:
    score, feedback = judged(want, got)
    assert score == 0.0
    assert fault in feedback


def test_generated_outputs_are_what_python_really_returns() -> None:
    task = build(train=150, val=1, test=1)
    for gold in task.trainset:
        space: dict = {}
        exec(gold.code, space)
        assert repr(space["main"](ast.literal_eval(gold.input))) == gold.output
    assert len({type(ast.literal_eval(gold.output)) for gold in task.trainset}) >= 5


def test_a_generated_program_that_fails_is_told_and_not_skipped() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        outputs([("def main(x):\n    return 1 / 0", "1")])


def test_an_oracle_solves_the_offline_set_through_the_program() -> None:
    task = build(train=1, val=1, test=30)
    lm = DummyLM({gold.code: {"reasoning": "I ran it.", "output": gold.output} for gold in task.testset})
    with dspy.context(lm=lm):
        assert [metric(gold, task.program(**gold.inputs())).score for gold in task.testset] == [1.0] * 30


def test_a_public_row_becomes_its_first_run_and_one_without_runs_is_left_out() -> None:
    row = {"refcode": "def f(a): return [a]", "funcname": "f", "ios": [{"input": {"a": True}, "output": [True]}]}
    example = public_example(row)
    assert example is not None
    assert example.output == "[True]"
    assert example.input == '{"function": "f", "arguments": {"a": true}}'
    assert public_example({**row, "ios": []}) is None
    assert public_example({**row, "refcode": "x" * 5000}) is None


# The sandbox


def test_the_sandbox_returns_what_was_printed() -> None:
    ran = run("print(sum(range(5)))")
    assert (ran.ended, ran.output) == ("done", "10\n")


@pytest.mark.parametrize(
    "source", ["while True: pass", "while True:\n    try: [0] * 9\n    except BaseException: pass"]
)
def test_an_endless_loop_is_ended_in_time(source: str) -> None:
    start = time.monotonic()
    assert run(source, Limits(seconds=1)).ended == "timeout"
    assert time.monotonic() - start < 8


def test_memory_is_limited() -> None:
    ran = run("x = bytearray(400 << 20)")
    assert (ran.ended, ran.error) == ("failed", "MemoryError")
    assert run("x = bytearray(400 << 20)", Limits(memory_mb=1024)).ended == "done"


def test_output_is_limited() -> None:
    ran = run("while True: print('x' * 1000)", Limits(output_kb=8))
    assert ran.ended == "failed"
    assert len(ran.output) == 8 << 10


def test_no_file_is_written_or_read_and_no_socket_opened(tmp_path: Path) -> None:
    target = tmp_path / "written"
    for source in (
        f"open({str(target)!r}, 'w').write('x')",
        f"open({__file__!r}).read()",
        "import socket",
        "import _socket; _socket.socket()",
    ):
        ran = run(source)
        assert ran.ended == "failed"
        assert "Too many open files" in ran.error
    assert not target.exists()


def test_a_program_sees_no_environment_and_no_site_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ran = run("import os, sys\nprint('OPENAI_API_KEY' in os.environ, [p for p in sys.path if 'site-packages' in p])")
    assert ran.output == "False []\n"
