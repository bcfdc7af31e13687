"""A plugin of vLLM with which the processes of a server on a CPU are forked from its first one.

By default each of the three imports vLLM and torch for itself. `tests/conftest.py` puts this folder on PYTHONPATH;
with `VLLM_PLUGINS=` in the environment a server starts as a user's does.
"""

import os


def install() -> None:
    """Called by vLLM in each process before it makes its configuration, maybe several times."""
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config.__func__
    if checked.__module__ == __name__:
        return

    def then_fork(platform, config) -> None:
        checked(platform, config)  # which sets the variable to spawn
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(then_fork)
