"""What a person sees: plain lines without a terminal, a live view with one, one output in a notebook."""

import io
import re
import time
from contextlib import suppress

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console
from transformers.utils import logging as transformers_logging

from dspy_fst.monitoring.progress import NOTEBOOK_S, ProgressView, counted, sparkline
from tests.report.happenings import cycle, plan, step

INSTRUCTION = "Reverse\nthe [[ ## list ## ]].\x1b[2J " + "x" * 100
EVENTS = [
    plan(),
    {"event": "note", "text": "slow: 4 updates"},
    {"event": "phase", "phase": "cycle 0: evolving instructions"},
    {"event": "rollout", "reward": 1.0},
    {"event": "candidate", "texts": {"solve": INSTRUCTION}, "score": 0.5},
    cycle(0, {"Solve it.": 0.25, INSTRUCTION: 0.5}, {INSTRUCTION: ["Solve it."]}, [INSTRUCTION], reflections=1),
    {"event": "phase", "phase": "step 0: rollouts", "quiet": True},
    *[{"event": "rollout", "reward": None if number < 8 else 1.0} for number in range(32)],
    {"event": "phase", "phase": "weight update", "quiet": True},
    step(0, 0.25, lost={"masked: timeout": 8}, kl_to_start=None),
]


class Clock:
    """Time that moves when it is told to."""

    now = 1000.0

    def __call__(self):
        return self.now


def shown(terminal, events=EVENTS, width=120, **settings):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    with ProgressView("demo", console, clock=Clock(), **settings) as view:
        for event in events:
            view(event)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()) if terminal else console.file.getvalue()


def last_frame(text):
    """The view as it stood at the end."""
    lines = text.splitlines()
    return lines[max(number for number, line in enumerate(lines) if line.startswith("demo  ")) :]


def test_without_a_terminal_each_event_is_one_plain_line():
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert all(line.startswith("[demo] ") for line in text.splitlines())
    assert "slow: 4 updates" in text
    assert "cycle 0: best candidate 0.500 on the anchors, 20 rollouts and 3 repeats, 1 reflection, 2 accepted" in text
    assert "step 0: reward 0.250, entropy 0.300, 1/4 groups flat, 90 tokens" in text
    assert "masked: timeout x8" in text
    assert len(text.splitlines()) == 4


def test_the_distance_to_the_start_is_shown_where_it_is_measured():
    events = [*EVENTS, step(1, 0.5, kl_to_start=0.0012)]
    assert "step 1: reward 0.500, KL 0.0012, entropy 0.300" in shown(terminal=False, events=events)
    assert re.search(r"KL to start +0.0012 nats", "\n".join(last_frame(shown(terminal=True, events=events))))
    assert "KL" not in shown(terminal=True), "without a KL term there is none"


def test_plain_lines_are_written_at_once():
    written = []

    class Pipe(io.StringIO):
        def flush(self):
            written.append(self.getvalue())

    view = ProgressView("demo", Console(file=Pipe()))
    view({"event": "note", "text": "hello"})
    assert written[-1] == "[demo] hello\n"


def test_a_note_s_table_keeps_its_lines():
    file = io.StringIO()
    view = ProgressView("demo", Console(file=file))
    view({"event": "note", "text": "what was tried:\n 25%  JSONAdapter\n 0%  XMLAdapter"})
    assert file.getvalue() == "[demo] what was tried:\n   25%  JSONAdapter\n   0%  XMLAdapter\n"


def test_a_log_that_cannot_write_a_sign_gets_another_one():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    view = ProgressView("demo", Console(file=file))
    view({"event": "note", "text": "naïve\x1b[2J – done"})  # noqa: RUF001
    assert file.buffer.getvalue() == b"[demo] na?ve [2J ? done\n"


def test_a_long_wait_says_that_rollouts_are_coming_in():
    clock = Clock()
    console = Console(file=io.StringIO())
    view = ProgressView("demo", console, clock=clock)
    view({"event": "phase", "phase": "step 0: rollouts", "quiet": True})
    clock.now += 31
    view({"event": "rollout", "reward": 1.0})
    view({"event": "rollout", "reward": 1.0})
    clock.now += 31
    view({"event": "rollout", "reward": 1.0})
    assert console.file.getvalue().splitlines() == [
        "[demo] step 0: rollouts: 1 rollout",
        "[demo] step 0: rollouts: 3 rollouts",
    ]


def test_a_terminal_shows_where_the_run_stands():
    frame = "\n".join(last_frame(shown(terminal=True)))
    assert frame.startswith("demo  weight update")
    assert "1 of 2 searches, 1 of 4 updates" in frame
    assert re.search(r"rollouts +52 of 176, 15.4% masked", frame)
    assert re.search(r"reward +0.250  ▁", frame)
    assert re.search(r"entropy +0.300 nats", frame)
    assert re.search(r"groups flat +1 of 4", frame)
    assert re.search(r"best texts +0.500  Reverse the \[\[ ## list ## \]\]\.", frame)
    assert re.search(r"time +starting 0 s, evolving instructions 0 s, rollouts 0 s, weight update 0 s", frame)


@pytest.mark.parametrize("width", [60, 40])
def test_a_narrow_terminal_shows_the_same_in_shorter_lines(width):
    frame = last_frame(shown(terminal=True, width=width))
    assert all(len(line) <= width for line in frame)
    heads = ["progress", "rollouts", "reward", "entropy", "groups flat", "best texts", "time"]
    assert [line.split("  ")[0] for line in frame if line.split("  ")[0] in heads] == heads
    assert "weight update 0 s" in " ".join(" ".join(frame).split()), "times go on in the next line"


def test_candidates_of_a_new_search_replace_those_of_the_old_one():
    events = [*EVENTS, *[{"event": "candidate", "texts": {"solve": said}, "score": at} for said, at in NEW]]
    frame = "\n".join(last_frame(shown(terminal=True, events=events)))
    assert "Reverse" not in frame
    assert [frame.index(f"{at:.3f}  {said}") for said, at in sorted(NEW, key=lambda new: -new[1])[:3]] == sorted(
        frame.index(said) - 7 for said in ("third", "first", "fourth")
    )
    assert "second" not in frame


NEW = [("first", 0.6), ("second", 0.1), ("third", 0.9), ("fourth", 0.5)]


def test_what_is_left_is_told_only_once_a_step_was_measured():
    clock = Clock()
    view = ProgressView("demo", Console(file=io.StringIO(), force_terminal=True), clock=clock)

    def left():
        return view._times.left(view._standing)

    def play(count):
        for _ in range(count):
            view({"event": "rollout", "reward": 1.0})

    view(plan() | {"budget": {**plan()["budget"], "validation_rollouts": 8}})
    view({"event": "phase", "phase": "cycle 0: evolving instructions"})
    play(20)
    clock.now += 10
    view(EVENTS[5])
    assert left() is None
    view({"event": "phase", "phase": "step 0: rollouts", "quiet": True})
    play(32)
    clock.now += 32
    view(step(0, 0.5))
    # One search of 24 rollouts at 0.5 s, three updates of 32 at 1 s, and 8 rollouts of validation as in an update.
    assert left() == 12 + 96 + 8
    clock.now += 100
    assert left() == 16
    clock.now += 17
    assert left() is None, "nothing is promised once the time is over"


def test_a_continued_run_shows_what_was_done_before_and_promises_nothing_of_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressView("demo", console) as view:
        view.recall(EVENTS)
        view({"event": "plan", "budget": plan()["budget"]})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "1 of 2 searches, 1 of 4 updates" in text
    assert "52 of 176, 15.4% masked" in text
    assert "best candidate" not in text, "old lines are not told again"
    assert "left" not in text


def test_sparklines_and_counts():
    assert sparkline([0.0, None, 0.5, 1.0]) == "▁ ▄█"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert sparkline([None]) == " "
    assert counted(1, "rollout") == "1 rollout"
    assert counted(1200, "search") == "1,200 searches"


@pytest.mark.filterwarnings("ignore:Cannot (dis|en)able progress bars")
@pytest.mark.parametrize("wanted", [True, False])
def test_other_libraries_bars_are_silent_in_the_view_and_as_before_after_it(monkeypatch, wanted):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", wanted)
    with suppress(KeyboardInterrupt), ProgressView("demo", Console(file=io.StringIO())):
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyboardInterrupt
    assert transformers_logging.is_progress_bar_enabled() == wanted


NOTEBOOK = f"""
from dspy_fst.monitoring.progress import ProgressView

with ProgressView("demo") as view:
    for _ in range(50):
        for event in {EVENTS!r}:
            view(event)
"""


@pytest.mark.slow
def test_a_notebook_has_one_output_that_is_replaced_in_place(pytestconfig):
    sent = []

    class Client(NotebookClient):
        def process_message(self, message, cell, index):
            sent.append(message["msg_type"])
            return super().process_message(message, cell, index)

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    resources = {"metadata": {"path": str(pytestconfig.rootpath)}}
    began = time.monotonic()
    Client(book, timeout=120, kernel_name="python3", resources=resources).execute()
    (output,) = [output for output in book.cells[0].outputs if output.output_type == "display_data"]
    assert "50 of 2 searches, 50 of 4 updates" in output.data["text/plain"]
    assert "slow: 4 updates" in output.data["text/plain"], "notes stay in the view"
    assert "reward" in output.data["text/html"]
    forced, now_and_then = 100, (time.monotonic() - began) / NOTEBOOK_S
    assert 1 <= sent.count("update_display_data") <= forced + now_and_then + 1
