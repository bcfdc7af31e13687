"""How the code is laid out: bounds on what `python -m benchmarks.house` measures of this checkout."""

from pathlib import Path

import pytest

from benchmarks.house import HERE, LONG_FUNCTION, entered_by_one_step, measured

ENTERED = 30
"""Files entered between the sampling of a step and the optimizer's step."""


def test_no_function_is_long_no_modules_import_in_a_circle_and_nothing_stands_twice():
    found = measured(HERE)
    assert found[f"functions over {LONG_FUNCTION} lines"] == {}
    assert found["circles of modules"] == found["circles of packages"] == []
    assert found["class names that stand twice"] == {}
    assert found["functions with the same body"] == []


@pytest.mark.slow
def test_one_step_enters_neither_the_run_s_files_nor_a_listener_nor_a_loader():
    files = {file for file, _ in entered_by_one_step(HERE)}
    assert {Path(file).parts[0] for file in files} == {
        *("engine", "outcomes", "rollout", "slow", "training"),
        *("policy_lm.py", "types.py"),
    }
    assert {file for file in files if file.startswith("training/")} == {"training/session.py"}
    assert len(files) <= ENTERED
