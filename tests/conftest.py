"""Settings of the whole test run."""

import signal

import pytest
import transformers
from hypothesis import settings

# Deadlines measure the machine's other work; a random example that fails once must fail again.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
transformers.logging.disable_progress_bar()

# A runner in the background ignores these, and children inherit it: what tests send would not arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers first: a long one that begins last would keep one of two workers waiting."""
    served = {item.path for item in items if item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in served)
