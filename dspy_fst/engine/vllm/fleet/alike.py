"""Whether servers that somebody else launched serve the same model alike, asked before any of them gets weights."""

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.attachable import require_attachable
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.fleet.placing import addresses
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError, NoAnswerError

ANSWER_S = 20.0
"""Longest wait for an answer that takes no work, in seconds (ours)."""


class Kind(NamedTuple):
    """What servers of one run must have in common."""

    model: str
    """As the command line of the server has it."""
    max_model_len: object
    """Its context in tokens."""
    dtype: str | None

    def __str__(self) -> str:
        precision = f", dtype {self.dtype}" if self.dtype else ""
        return f"{self.model}, max_model_len {self.max_model_len}{precision}"


def require_alike(settings: VLLMSettings) -> Kind | None:
    """What the servers at ``attach_url`` are; None for servers that are launched from here.

    Raises:
        EngineError: `attached_faults` of them, all in one message.
    """
    if settings.attach_url is None:
        return None
    kinds, faults = _asked(settings)
    if faults:
        raise EngineError("; ".join(faults.values()))
    return next(iter(kinds.values()))


def attached_faults(settings: VLLMSettings, model: Path | None = None) -> Mapping[str, str]:
    """Why servers at ``attach_url`` cannot be of use to the model in this folder: address -> a sentence.

    Nothing is changed on any of them.
    """
    return {} if settings.attach_url is None else _asked(settings, model)[1]


def require_kind(settings: VLLMSettings, wanted: Kind) -> None:
    """Check one attached server that comes back.

    Raises:
        EngineError: it was started anew as another, or does not answer.
    """
    found = require_alike(settings)
    if found != wanted:
        raise EngineError(f"it was started anew as {found}, and the run began on {wanted}: launch it as before")


def _asked(settings: VLLMSettings, model: Path | None = None) -> tuple[dict[str, Kind], dict[str, str]]:
    """What each server is, and what is wrong with which."""
    assert settings.attach_url is not None
    urls = addresses(settings.attach_url)
    kinds: dict[str, Kind] = {}
    faults: dict[str, str] = {}
    processes: defaultdict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(len(urls)) as pool:
        for url, told in zip(urls, pool.map(partial(_told, settings, model), urls), strict=True):
            if isinstance(told, str):
                faults[url] = told
            else:
                process, kinds[url] = told
                processes[process].append(url)
    for same in processes.values():
        if len(same) > 1:
            faults[same[1]] = f"attach_url: {' and '.join(same)} are one server: name each server once"
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{url}: {kind}" for url, kind in kinds.items())
        faults[", ".join(kinds)] = (
            f"the servers at attach_url differ: {listed}. Launch all of them on one model with the same "
            "--max-model-len and --dtype"
        )
    return kinds, faults


def _told(settings: VLLMSettings, model: Path | None, url: str) -> tuple[str, Kind] | str:
    """A server's process and kind, or what is wrong with it."""
    address = Address(url, settings.api_key, through_proxy=True)
    client = VLLMClient(address, request_timeout_s=ANSWER_S, load_timeout_s=ANSWER_S)
    try:
        card, served = require_attachable(client, settings.max_model_len, model)
        return served.name, Kind(str(card.get("root")), card.get("max_model_len"), served.dtype)
    except NoAnswerError as error:
        return f"attach_url: the vLLM server at {url} does not answer: {error}. Launch it, or correct its address"
    except EngineError as error:
        return f"attach_url: {error}"
    finally:
        client.close()
