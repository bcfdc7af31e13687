"""The versions of LoRA adapters that one running vLLM server holds at the same time.

The contract of this file:

- Every version is loaded beside the calls in flight. Nothing is paused, and the base is not read again.
- Every load has a name of its own on this server, e.g. ``"shared@step-000007"``. vLLM's prefix cache is keyed by name
  and path (0.32, `v1/core/kv_cache_utils.py`), so keys and values of another version are never continued.
- A call keeps the version that was current when it began.
- A version that is not current is unloaded after its last call.
- No more versions are held than the server keeps in memory: vLLM reads an evicted adapter from its folder again, and a
  run may have removed the folder. A load waits until there is room.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from dspy_fst.engine.base import Checkpoint, Holding
from dspy_fst.engine.vllm.lora_client import LoRAClient
from dspy_fst.engine.vllm.lora_files import HEAD, LoRANeeds
from dspy_fst.errors import EngineError
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)

UNLOADED = "no weights are served: call load(checkpoint), again if the last one failed"


@dataclass(frozen=True)
class _Current:
    checkpoint: Checkpoint
    names: Mapping[str, str]
    """Adapter -> its name on the server."""


class Target(NamedTuple):
    """What a call is sampled from."""

    model: str | None
    """Name on the server; None: the base's."""
    version: WeightsVersion


class LoRAVersions:
    """See the contract above. Thread-safe.

    Args:
        server: The server, which serves the base.
        base: The version whose base it is.
        needs: What it was started for.
        capacity: How many adapters it keeps in memory; None: unknown.
        wait_s: Longest wait of a load for room, and so for the calls on old versions.
    """

    def __init__(self, server: LoRAClient, base: Checkpoint, needs: LoRANeeds, *, capacity: int | None, wait_s: float):
        self._server, self._base, self._needs = server, base, needs
        self._capacity, self._wait_s = capacity, wait_s
        self._current: _Current | None = None
        self._base_is_sound = False
        self._loading = threading.Lock()
        self._changed = threading.Condition()
        self._calls: Counter[str] = Counter()
        """Name on the server -> calls in flight."""
        self._loaded: set[str] = set()
        self._uses: Counter[str] = Counter()
        """Name -> how often a version of this name was loaded."""

    @property
    def version(self) -> WeightsVersion | None:
        """The version that new calls are sampled from; None after a load that failed."""
        current = self._current
        return current.checkpoint.version if current else None

    @property
    def head_is_adapted(self) -> bool:
        """Whether the server was started with LoRA on the LM head; see `VLLMServer.score`."""
        return HEAD in self._needs.modules

    def refuses(self, checkpoint: Checkpoint) -> str | None:
        """Why the server cannot go over to this version without a restart; None if it can."""
        if not checkpoint.adapters:
            return "it was started for LoRA adapters, and the new weights are whole ones"
        if not _same_base(checkpoint, self._base):
            return "the new LoRA adapters belong to another base than the one that it serves"
        return LoRANeeds.of(checkpoint.adapters).beyond(self._needs)

    def load(self, checkpoint: Checkpoint) -> None:
        """Make these adapters the ones that new calls are sampled from.

        Raises:
            EngineError: the server refused one, or had no room in time. New calls have no version then.
        """
        with self._loading:
            self._unload_idle()  # what a load that failed left behind
            self._wait_for_room(len(checkpoint.adapters))
            names: dict[str, str] = {}
            try:
                for adapter in checkpoint.adapters:
                    names[adapter.name] = name = self._new_name(f"{adapter.name}@{checkpoint.version}")
                    self._server.load(name, adapter.path.resolve())
            except BaseException:
                self._go_over_to(None, names.values())
                raise
            self._go_over_to(_Current(checkpoint, names), names.values())
        self._unload_idle()

    @contextmanager
    def calling(self, adapter: str | None) -> Iterator[Target]:
        """Hold the current version for one call.

        Args:
            adapter: See `Checkpoint.adapter`.

        Raises:
            EngineError: no version is served, or it has no adapter of this name.
        """
        with self._changed:
            target = self._target(adapter)
            if target.model is not None:
                self._calls[target.model] += 1
        try:
            yield target
        finally:
            if target.model is not None:
                with self._changed:
                    self._calls[target.model] -= 1
                self._unload_idle()

    def distrust_base(self) -> None:
        """Compare the base again at the next check: the server moved it, to sleep."""
        self._base_is_sound = False

    def held(self, checkpoint: Checkpoint, compare_base: Callable[[], Holding | None]) -> Holding | None:
        """Compare the adapters in use with a version's, and their base until it was found sound; see `Scorer.held`.

        Args:
            checkpoint: The version.
            compare_base: Compares the base that the server uses with the version's; None: the server cannot tell.
        """
        current = self._require_current()
        base = None if self._base_is_sound else compare_base()
        if not self._server.extended or (base is None and not self._base_is_sound):
            return None
        digests, wrong = ({}, {}) if base is None else (dict(base.digests), dict(base.wrong))
        self._base_is_sound = not wrong
        dtype = ""
        for adapter in checkpoint.adapters:
            name = current.names.get(adapter.name)
            if name is None:
                raise EngineError(f"the server has no LoRA adapter {adapter.name!r}; it has {[*current.names]}")
            found = self._server.held(name, adapter.path.resolve())
            digests |= {adapter.tensor(tensor): digest for tensor, digest in found.digests.items()}
            wrong |= {adapter.tensor(tensor): how for tensor, how in found.wrong.items()}
            dtype = found.dtype
        return Holding(digests, wrong, dtype, with_base=base is not None)

    def _target(self, adapter: str | None) -> Target:
        current = self._require_current()
        try:
            chosen = current.checkpoint.adapter(adapter)
        except ValueError as error:
            raise EngineError(str(error)) from error
        if chosen is None and not self._server.extended:  # see `_leave_the_base_alone` in served/dspy_fst_lora_check.py
            raise EngineError(
                "a call without a LoRA adapter needs dspy_fst's worker extension in the vLLM server, because vLLM on a "
                "CPU computes it with another call's adapter; launch the server with --worker-extension-cls "
                "dspy_fst_weight_check.WeightCheck and dspy_fst/engine/vllm/served on its PYTHONPATH"
            )
        return Target(current.names[chosen.name] if chosen else None, current.checkpoint.version)

    def _require_current(self) -> _Current:
        if self._current is None:
            raise EngineError(UNLOADED)
        return self._current

    def _new_name(self, name: str) -> str:
        self._uses[name] += 1
        return name if self._uses[name] == 1 else f"{name}#{self._uses[name]}"

    def _wait_for_room(self, adapters: int) -> None:
        def has_room() -> bool:
            return self._capacity is None or len(self._loaded) + adapters <= self._capacity

        with self._changed:
            if not self._changed.wait_for(has_room, self._wait_s):
                raise EngineError(
                    f"a load waited {self._wait_s:g} s for calls on older LoRA adapters to finish (request_timeout_s): "
                    f"{', '.join(sorted(self._loaded))} fill the server's {self._capacity} places (max_loras)"
                )

    def _go_over_to(self, current: _Current | None, loaded: Iterable[str]) -> None:
        with self._changed:
            self._current = current
            self._loaded.update(loaded)

    def _unload_idle(self) -> None:
        """Unload the names that are not current and that no call uses."""
        with self._changed:
            current = self._current.names.values() if self._current else ()
            idle = {name for name in self._loaded.difference(current) if not self._calls[name]}
            self._loaded -= idle
            self._changed.notify_all()
        for name in sorted(idle):
            try:
                self._server.unload(name)
            except EngineError as error:  # the call that ended has its reply, and no later call uses the name
                logger.warning("vLLM keeps the LoRA adapter %s, which no call uses any more: %s", name, error)


def _same_base(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two versions have the same base, by what was written where that is known, else by its folder."""
    if one.digests and other.digests:
        return dict(one.digests) == dict(other.digests)
    return one.path.resolve() == other.path.resolve()
