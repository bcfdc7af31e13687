"""Settings of the whole test run."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
import transformers
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from tests.serve.command import Server

# A quarter of the processor time of importing and rewriting all tests: next to nothing of it is garbage.
gc.disable()

# Deadlines measure the machine's other work; a random example that fails once must fail again.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
transformers.logging.disable_progress_bar()


def in_memory() -> Path | None:
    """A file system in memory with room for what tests write; tests/real writes gigabytes, to the disk.

    On a disk a small run waits for its 155 fsyncs, which takes half as long as what it computes.
    """
    shared, gib = Path("/dev/shm"), 2**30
    if not shared.is_dir() or shutil.disk_usage(shared).free < 8 * gib:
        return None
    return shared if psutil.virtual_memory().available > 8 * gib else None


if (folder := in_memory()) is not None:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(folder))  # pytest's name for where tmp_path lies
# DSPy, not imported yet, keeps replies of LMs in the home folder: those of an earlier test run would be taken.
# It opens 16 databases there in each process that imports it, which takes half a second on a busy disk.
CACHE = tempfile.TemporaryDirectory(prefix="dspy-cache-", dir=folder)
os.environ["DSPY_CACHEDIR"] = CACHE.name
# Without a network litellm asks three times for its newest prices while it is imported, in every process.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
# The start of a vLLM server is imports of vLLM, by three processes: with this plugin, by one.
FORKED = Path(__file__).parent / "engine/forked"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FORKED), os.environ.get("PYTHONPATH")]))

# A runner in the background ignores these, and children inherit it: what tests send would not arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


SERVED_LIMIT_S = 1800
"""Of a test on vLLM, its share of starting servers included: half a minute each, or several where cores are few."""
TESTS = Path(__file__).parent
TAKE_LONG = {
    *("test_cli.py", "test_compile.py", "test_evidence.py", "test_lora_runs.py", "test_micro_batch.py"),
    *("test_better_together.py", "test_nothing_silent.py", "test_one_world.py", "test_options_together.py"),
    *("test_resampling.py", "test_retirement.py", "test_reuse.py", "test_start_and_end.py"),
    *("test_state_in_background.py", "test_warm_start.py"),
    *("fast/test_demo_search.py", "fast/test_proposals_at_once.py", "fast/test_seated_runs.py"),
    "fast/test_seated_search.py",
    *("provider/test_fine_tuning.py", "provider/test_grpo.py", "provider/test_together.py"),
    *("run/test_ending.py", "run/test_journal.py"),
    *("cases/test_adapters.py", "cases/test_architectures.py", "cases/test_architectures_compile.py"),
    *("cases/test_before_start.py", "cases/test_copies.py", "cases/test_lms_and_saving.py", "cases/test_outside.py"),
    *("cases/test_nothing_learned.py", "cases/test_queueing.py", "cases/test_sync.py", "cases/test_unmoved_steps.py"),
    *("cases/test_weight_check_memory.py", "report/test_charts.py", "report/test_page.py"),
    *("cli/test_adapter_flag.py", "cli/test_eval.py", "cli/test_export.py", "cli/test_export_hub.py"),
    *("cli/test_export_lora.py", "cli/test_init.py", "cli/test_more_cycles.py", "cli/test_serve.py"),
    *("pipelines/test_adversarial.py", "pipelines/test_shapes.py", "pipelines/test_tool_loop.py"),
    *("programs/test_compiles.py", "programs/test_lab.py", "programs/test_tiny.py"),
    *("cases/test_publish_checks.py", "cases/test_side_by_side.py", "serve/test_bodies.py", "docs/test_snippets.py"),
    *("slow/test_heap.py", "slow/test_predictor_credit.py", "slow/test_quantized.py"),
}
"""Files whose tests, or what they share, train or sample for long: most of the time of a fifth of all tests."""
END_WHAT_IS_SHARED = {TESTS / "serve/test_clients.py"}
"""Files that end a server which others ask before them."""
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def signals_are_left_alone() -> Iterator[None]:
    """A handler that stays meets the next signal of another test, whichever shares the process."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    after = {number: signal.getsignal(number) for number in HANDLED}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True)
def dspy_is_configured_as_before() -> Iterator[None]:
    """An adapter or an LM that stays configured would change the runs of another file's tests."""
    before = dict(settings_of_dspy())
    yield
    after = dict(settings_of_dspy())
    restore_dspy(before)
    changed = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    assert not changed, f"dspy.configure was left changed: {sorted(changed)}"


@pytest.fixture
def servers_start_as_a_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose vLLM server must start as it does without the tests' plugin."""
    monkeypatch.setenv("VLLM_PLUGINS", "")


@pytest.fixture
def dspy_may_be_configured(dspy_is_configured_as_before: None) -> Iterator[None]:
    """For tests that run a user's code, which calls ``dspy.configure``."""
    before = dict(settings_of_dspy())
    yield
    restore_dspy(before)


def settings_of_dspy() -> dict[str, object]:
    from dspy.dsp.utils.settings import main_thread_config  # not before DSPY_CACHEDIR is set

    return main_thread_config


def restore_dspy(values: dict[str, object]) -> None:
    settings_of_dspy().clear()
    settings_of_dspy().update(values)


def pytest_collection_finish() -> None:
    """What imports made stays. Each full collection of garbage would walk through it, for half a second of a core."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that look for leaks when the process ends would name all of it."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers first, then those with slow tests: a long one that begins last keeps a worker idle."""
    long = {TESTS / name for name in TAKE_LONG}
    served = {item.path for item in items if item.get_closest_marker("vllm")}
    for item in items:
        if item.path in long:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.timeout(SERVED_LIMIT_S))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in served, item.path not in slow, item.path in END_WHAT_IS_SHARED))


@pytest.fixture(scope="session")
def lab_on_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """`dspy-fst serve` of the laboratory's program, on a vLLM server to which engines may attach.

    Whoever loads other weights there loads those of `programs.lab.BASE` at the end.
    """
    from tests.serve.command import saved_lab, serving

    out = saved_lab(tmp_path_factory.mktemp("lab") / "out")
    with serving(out, "--program", "programs.lab.project:program", "--engine", "vllm") as command:
        command.wait_for(lambda: bool(command.url), "it listens")
        assert httpx.get(f"{command.url}/health", timeout=60).json() == {"alive": True}
        command.wait_for(command.ready, "vLLM serves weights", limit_s=500)
        yield command


SHARED = {
    **{
        f"tests/engine/test_{name}.py": "a vLLM server"
        for name in ("replies", "transfer", "vllm_rows", "vllm_server", "weight_check")
    },
    **{
        f"tests/{name}.py": "the laboratory on vLLM"
        for name in ("cluster/test_attached", "engine/test_contract", "provider/test_together", "serve/test_clients")
    },
    **{
        f"tests/cli/test_{name}.py": "a finished run"
        for name in ("eval", "export", "export_lora", "more_cycles", "runs", "show", "trust")
    },
}
"""File -> what it shares with others and takes long to make."""
REAL = "tests/real/"
"""Two processes with a real model each would need 16 GB."""


class FilesOrGroups(LoadFileScheduling):
    """A file's tests go to one worker, and so do those of files that share what takes long or need much memory."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return REAL if file.startswith(REAL) else SHARED.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadFileScheduling | None:
    return FilesOrGroups(config, log) if config.getoption("dist") == "loadfile" else None
