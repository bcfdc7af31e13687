"""Whether vLLM servers that somebody else launched can be of use to a run, asked before anything is loaded.

They read published weights from the run's directory, and may run on other machines. One to which weights are sent reads
none.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dspy_fst.engine.options import make_settings
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.fleet.alike import attached_faults
from dspy_fst.engine.vllm.fleet.placing import addresses
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.run.files import probe_for

PROBE_S = 20.0
"""Longest wait for a server's answer before a run, in seconds (ours)."""


def attached_server_faults(policy: PolicyLM, run_dir: Path) -> list[str]:
    """A sentence for each attached server that does not answer, was launched otherwise than it must be or than the
    others, or does not see what is written for ``run_dir``; a file is written and removed.

    Of a server whose workers lack our extension nothing is known of the directory.
    """
    handle = policy.handle
    if handle.resolved_kind != "vllm" or handle.options.get("attach_url") is None:
        return []
    settings = make_settings(VLLMSettings, handle.options, "vllm")
    assert settings.attach_url is not None
    folder = handle.checkpoint.path
    useless = attached_faults(settings, folder if (folder / "config.json").is_file() else None)
    urls = [url for url in addresses(settings.attach_url) if url not in useless]
    if settings.weight_transfer != "disk" or not urls:
        return list(useless.values())
    with probe_for(run_dir.resolve()) as probe, ThreadPoolExecutor(len(urls)) as pool:
        content = probe.read_text(encoding="utf-8")
        seen = dict(zip(urls, pool.map(partial(_sees, settings, probe, content), urls), strict=True))
    return [*useless.values()] + [
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
