"""Many cycles and many runs in one process leave nothing behind; what grows is named."""

import threading

import pytest

from benchmarks.soak import (
    BY_DESIGN,
    TOLERANCE,
    Measure,
    cycles_of_one_run,
    growth,
    leaks,
    runs_in_one_process,
    slope,
)

ONE_MODEL = 3_800_000
"""Bytes of the laboratory's model."""


def growing(measures, by_design):
    """What leaks. Few measures see the allocator's steps, so memory may grow by a quarter of a model here."""
    slopes = growth(measures)
    assert slopes["memory"] < ONE_MODEL / 4
    return leaks({**slopes, "memory": 0.0}, by_design)


@pytest.mark.slow
def test_from_cycle_to_cycle_nothing_grows_but_the_log():
    measures = cycles_of_one_run(16)
    assert len(measures) == 16
    assert growing(measures, BY_DESIGN) == []


@pytest.mark.slow
def test_from_run_to_run_nothing_grows():
    assert growing(runs_in_one_process(6), {}) == []


@pytest.mark.slow
def test_whatever_leaks_is_named(tmp_path):
    kept, measures, end = [], [], threading.Event()
    for number in range(8):
        path = tmp_path / str(number)
        path.write_bytes(b"x" * 100_000)
        kept += [path.open(), b"x" * ONE_MODEL]  # written, so that it takes memory
        threading.Thread(target=end.wait, daemon=True).start()
        measures.append(Measure.now(tmp_path))
    end.set()
    for file in kept[::2]:
        file.close()
    # In a process that has freed much already, memory may grow without the system being asked for more.
    assert set(leaks(growth(measures), {})) - {"memory"} == set(TOLERANCE) - {"processes", "memory"}


def test_a_slope_is_deaf_to_outliers():
    assert slope([1.0, 2.0, 3.0, 400.0, 5.0, 6.0, 7.0]) == 1.0
    assert slope([5.0] * 9) == 0.0


def test_what_grows_by_design_is_no_leak():
    slopes = dict.fromkeys(TOLERANCE, 0.0)
    assert leaks({**slopes, "files": 1.0}, BY_DESIGN) == []
    assert leaks({**slopes, "files": 1.5}, BY_DESIGN) == ["files"]
    assert leaks({**slopes, "handles": 1.0}, BY_DESIGN) == ["handles"]
