"""Where the servers of a fleet lie in a Ray cluster: each in a bundle of one placement group.

The contract of this file:

- The group reserves the servers' CPUs and cards, spread over the machines, until the last server has ended.
- A bundle whose machine is lost is moved by Ray to another one with room, and the server that is launched next in it
  starts there. Until a machine has room its launch waits, within ``startup_timeout_s``.
- A server ends when it is stopped, when its actor ends, and when this process ends or leaves the cluster. Ray is asked
  nothing after that, as it would begin another cluster to answer.
"""

import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dspy_fst.engine.machine import has_gpu
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.fleet.placing import cards_of_one
from dspy_fst.engine.vllm.launched import Launched
from dspy_fst.engine.vllm.lora_files import LoRANeeds
from dspy_fst.engine.vllm.on_ray.actor import ServerActor
from dspy_fst.engine.vllm.on_ray.copies import Names, Sending, StoredFolder
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError, NoAnswerError

ANSWER_S = 30.0
"""How long an actor has to answer what needs no work (ours)."""
KILLED_S = 30.0
"""How much longer than its grace period a server may take to end (ours)."""
REMOVED_S = 5.0
"""How long Ray has to end a placement group (ours)."""
THREADS = 4
"""Calls that an actor answers at once: one waits for the server's end, and one of the others may stop it."""
NOT_CONNECTED = "on_ray: this process is connected to no Ray cluster; set the recipe's ray, or call ray.init first"


def bundle_of(settings: VLLMSettings) -> Mapping[str, float]:
    """What one server takes of a machine: a CPU, and cards if this process sees any, as its trainer does.

    >>> bundle_of(VLLMSettings(extra_args=("-tp", "2")))  # here without a card
    {'CPU': 1}
    """
    return bundle(cards_of_one(settings.extra_args))


def bundle(cards: int) -> Mapping[str, float]:
    """What a process takes of a machine: a CPU, and so many cards if this process sees any."""
    return {"CPU": 1, "GPU": cards} if cards and has_gpu() else {"CPU": 1}


class Places:
    """The places of a fleet's servers. Nothing is reserved before the first launch. Thread-safe.

    Args:
        settings: Of all of them together.
    """

    def __init__(self, settings: VLLMSettings):
        self.bundle = bundle_of(settings)
        self.sending = Sending()
        """Of what nodes without a shared folder take."""
        self._count = settings.servers
        self._group: PlacementGroup | None = None
        self._free: set[int] = set()
        self._lock = threading.Lock()

    def launch(self, settings: VLLMSettings, model: Path, loras: LoRANeeds | None) -> Launched:
        """Launch a server on a machine that has room, or will have; see `launched.Launch`."""
        if not ray.is_initialized():
            raise EngineError(NOT_CONNECTED)
        process = ActorProcess(self, settings, model, loras)
        return Launched(process, process.address)

    def take(self) -> tuple[PlacementGroup, int]:
        """A free bundle: its group and its number."""
        with self._lock:
            if self._group is None:
                self._group = placement_group([dict(self.bundle)] * self._count, strategy="SPREAD")
                self._free = set(range(self._count))
            return self._group, self._free.pop()

    def give_back(self, number: int) -> None:
        """Take a bundle back; with the last one the reservation ends."""
        with self._lock:
            self._free.add(number)
            if self._group is not None and len(self._free) == self._count:
                if ray.is_initialized():
                    end_reservation(self._group)
                self._group = None


def end_reservation(group: PlacementGroup) -> None:
    """End a placement group, and what still runs in it.

    Where a node of it has just been lost, Ray (2.60) may never answer, and its call has no time limit.
    """

    def remove() -> None:
        with suppress(RayError):
            remove_placement_group(group)

    removing = threading.Thread(target=remove, name="ray-places", daemon=True)
    removing.start()
    removing.join(REMOVED_S)


class ActorProcess:
    """The process of a server in an actor; see `launched.Process`. Thread-safe.

    Args:
        places: Where it finds one.
        settings: Of this server alone.
        model: The folder, on this machine.
        loras: What its LoRA adapters need.
    """

    def __init__(self, places: Places, settings: VLLMSettings, model: Path, loras: LoRANeeds | None):
        self._places, self._settings = places, settings
        self._ended: ray.ObjectRef[int | None] | None = None
        self._node = "Ray"
        self._stopped = threading.Lock()
        group, self._bundle = places.take()
        cards = int(places.bundle.get("GPU", 0))
        # Ray would kill an ending worker's children. One of them ends the server with the worker, and must live to.
        environment = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}
        placed = PlacementGroupSchedulingStrategy(group, self._bundle)
        options = {"num_cpus": 1, "num_gpus": cards, "max_concurrency": THREADS, "runtime_env": environment}
        self._actor = ray.remote(ServerActor).options(**options, scheduling_strategy=placed).remote(cards)
        self._names = Names()
        self._sent = ExitStack()
        """Open while the actor takes the model."""
        there = model if settings.shared_folder else self._in_store(model)
        self._launch = self._actor.launch.remote(settings, there, loras)

    def _in_store(self, model: Path) -> StoredFolder:
        try:
            return self._sent.enter_context(self._places.sending.sent(self._names.name(model), model))
        except OSError as error:
            self.stop()
            raise EngineError(f"{model} cannot be read: {error}") from error

    def address(self) -> Address:
        """Where the server listens, once its actor is placed and has launched it.

        Raises:
            EngineError: no machine had room in time, or the launch failed.
        """
        limit_s = self._settings.startup_timeout_s
        try:
            with self._sent:
                address, self._node = ray.get(self._launch, timeout=limit_s)
        except GetTimeoutError:
            raise EngineError(
                f"Ray found no machine for a vLLM server within {limit_s:g} s (startup_timeout_s): it needs "
                f"{in_words(self._places.bundle)}, and the cluster has {in_words(ray.available_resources())} free"
            ) from None
        except RayTaskError as error:
            raise EngineError(f"a vLLM server was not launched on Ray: {error.cause}") from error
        except RayError as error:
            raise EngineError(f"the Ray actor of a vLLM server was lost while it started: {error}") from error
        self._ended = self._actor.ended.remote()
        return address

    @property
    def log_path(self) -> str:
        return f"on {self._node}"

    @property
    def exit_status(self) -> int | None:
        if self._ended is None or not ray.is_initialized() or not self.exits_within(0):
            return None
        try:
            return ray.get(self._ended)
        except RayError:  # the actor is lost, and the server with it
            return None

    def exits_within(self, seconds: float) -> bool:
        if not ray.is_initialized():
            return True
        return self._ended is not None and bool(ray.wait([self._ended], timeout=seconds)[0])

    def output(self) -> list[str]:
        if not ray.is_initialized():
            return [NOT_CONNECTED]
        try:
            path, lines = ray.get(self._actor.output.remote(), timeout=ANSWER_S)
        except RayError as error:
            return str(error).splitlines()
        return [f"{path}:", *lines]

    def folder(self, here: Path) -> Path:
        if self._settings.shared_folder:
            return here
        if not ray.is_initialized():
            raise EngineError(NOT_CONNECTED)
        limit_s = self._settings.load_timeout_s
        try:
            name = self._names.name(here)
            there = ray.get(self._actor.find.remote(name), timeout=limit_s)
            if there is None:
                with self._places.sending.sent(name, here) as sent:
                    there = ray.get(self._actor.take.remote(sent), timeout=limit_s)
            return there
        except GetTimeoutError:
            late = f"within {limit_s:g} s (load_timeout_s)"
            raise NoAnswerError(f"{here} was not copied to {self._node} {late}") from None
        except (RayError, OSError) as error:
            why = error.cause if isinstance(error, RayTaskError) else error
            raise NoAnswerError(f"{here} was not copied to {self._node}: {why}") from error

    def kill(self) -> None:
        if ray.is_initialized():
            self._actor.kill.remote()

    def stop(self, *, keep_log: bool = False) -> None:
        if not self._stopped.acquire(blocking=False):
            return
        self._sent.close()
        if ray.is_initialized():
            if self._ended is not None:
                with suppress(RayError):
                    ray.get(self._actor.stop.remote(keep_log), timeout=self._settings.stop_grace_s + KILLED_S)
            ray.kill(cast(ActorHandle[ServerActor], self._actor))  # its type names the actor's methods, too
        self._places.give_back(self._bundle)


def in_words(resources: Mapping[str, float]) -> str:
    """Ray's resources as a reader counts them.

    >>> in_words({"CPU": 4.0, "GPU": 1.0, "memory": 1e9}), in_words({"memory": 1e9})
    ('4 CPUs and 1 card', '0 CPUs')
    """
    names = {"CPU": "CPU", "GPU": "card"}
    counts = [(resources.get(key, 0), name) for key, name in names.items() if key == "CPU" or resources.get(key)]
    return " and ".join(f"{count:g} {name}{'' if count == 1 else 's'}" for count, name in counts)
