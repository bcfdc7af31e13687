"""The settings of each server of a fleet by itself."""

from dataclasses import replace
from pathlib import Path

from dspy_fst.engine.vllm.fleet.placing import addresses, cards_of
from dspy_fst.engine.vllm.server_settings import VLLMSettings


def members_of(settings: VLLMSettings) -> list[VLLMSettings]:
    """The settings of each server by itself; sound settings are assumed (see `vllm_faults`)."""
    if settings.attach_url is not None:
        return [replace(settings, attach_url=url) for url in addresses(settings.attach_url)]
    if settings.servers == 1:
        return [settings]
    cards = cards_of(settings)
    return [
        replace(settings, servers=1, cards=cards[number] if cards else None, log_path=_log_of(settings, number))
        for number in range(settings.servers)
    ]


def _log_of(settings: VLLMSettings, number: int) -> Path | None:
    """A log of its own for each server, e.g. ``vllm-2.log`` for the second: an error quotes the end of one."""
    if settings.log_path is None:
        return None
    path = Path(settings.log_path)
    return path.with_stem(f"{path.stem}-{number + 1}")
