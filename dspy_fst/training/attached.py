"""Whether vLLM servers that somebody else launched see the run's directory, asked before anything is loaded.

They read published weights from there, and may run on other machines. One to which weights are sent reads none.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dspy_fst.engine.options import make_settings
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.fleet.placing import addresses
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.run.files import probe_for

PROBE_S = 20.0
"""Longest wait for a server's answer before a run, in seconds (ours)."""


def unseen_faults(policy: PolicyLM, run_dir: Path) -> list[str]:
    """A sentence for each attached server that does not see what is written for ``run_dir``; a file is written and
    removed.

    Nothing is said of a server that does not answer, which the start of the engine tells, nor of one whose workers lack
    our extension.
    """
    handle = policy.handle
    if handle.resolved_kind != "vllm" or handle.options.get("attach_url") is None:
        return []
    if handle.options.get("weight_transfer", "disk") != "disk":
        return []
    settings = make_settings(VLLMSettings, handle.options, "vllm")
    assert settings.attach_url is not None
    urls = addresses(settings.attach_url)
    with probe_for(run_dir.resolve()) as probe, ThreadPoolExecutor(len(urls)) as pool:
        content = probe.read_text(encoding="utf-8")
        seen = dict(zip(urls, pool.map(partial(_sees, settings, probe, content), urls), strict=True))
    return [
        f"attach_url: the vLLM server at {url} does not see {probe.parent}, and must read published weights below "
        f"run_dir={str(run_dir)!r}; name a run_dir on storage that both machines mount under the same path"
        for url, sees in seen.items()
        if not sees
    ]


def _sees(settings: VLLMSettings, probe: Path, content: str, url: str) -> bool:
    client = VLLMClient(
        Address(url, settings.api_key, through_proxy=True), request_timeout_s=PROBE_S, load_timeout_s=PROBE_S
    )
    try:
        answers = client.run("dspy_fst_sees", optional=True, file=str(probe), content=content)
        return answers is None or all(answers)
    except EngineError:
        return True
    finally:
        client.close()
