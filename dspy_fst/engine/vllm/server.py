"""The engine that users run: a vLLM server, launched here or elsewhere, whose weights are swapped in place.

The contract of this file: nothing starts before the first ``load``; what was started is always ended; no
reply straddles two versions; every wait has a limit that its error names. vLLM's flags stand in vllm_launch.py.
Written for vLLM 0.32 (CPU) and 0.33; what differs on a GPU (dtype, CUDA graphs) is untried.
"""

import logging
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dspy.lm15 import Request

from dspy_fst.engine.addresses import free_port
from dspy_fst.engine.base import Checkpoint, Completion, Holding
from dspy_fst.engine.replies import UNREAD, ReplyReader
from dspy_fst.engine.stop_tokens import with_stop_tokens
from dspy_fst.engine.template_traits import fitted
from dspy_fst.engine.vllm.client import Address, NoAnswerError, VLLMClient
from dspy_fst.engine.vllm.diagnosis import last_words, obituary
from dspy_fst.engine.vllm.launch import vllm_command, vllm_environment
from dspy_fst.engine.vllm.process import ServerProcess
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.engine.weights_lock import WeightsLock
from dspy_fst.errors import EngineError
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)

_READINESS_POLL_S = 0.25
_PROGRESS_EVERY_S = 15.0
_DEATH_NOTICE_S = 3.0
"""How long a server whose connection broke gets to be seen as dead, so that the error can say why."""
_WIND_UP_S = 60.0
"""The same for one whose engine has died: it says so to health checks and takes its time to end. Then it is killed."""

_HOW_TO_ATTACH = (
    "Launch it with VLLM_SERVER_DEV_MODE=1, VLLM_API_KEY and a PYTHONPATH with dspy_fst/engine/vllm/served in its "
    "environment, and with --logprobs-mode processed_logprobs --generation-config vllm "
    "--middleware dspy_fst_key_guard.KeyGuard --worker-extension-cls dspy_fst_weight_check.WeightCheck "
    """--hf-overrides '{"head_dtype": "float32"}', on a host that nobody else reaches: """
    "these endpoints can run any method, and vLLM's own check of the key leaves them open."
)


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
        self._lock = WeightsLock()
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
    def in_flight(self) -> int:
        """Requests that wait for tokens now; 0 while weights are loaded or compared."""
        return self._lock.samplers

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

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights: launches the server at the first call, swaps them in place later.

        Requests in flight finish first, under the weights they started with; later ones wait.

        Raises:
            EngineError: the folder, the launch or the swap is at fault, or a wait was too long. After a
                launch or swap that failed nothing is sampled until a load succeeds.
        """
        require_checkpoint(checkpoint)
        with self._lock.loading(self.settings.request_timeout_s), self._explaining_death():
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
        still = self._lock.sampling if sampling else self._lock.checking
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
                raise EngineError(f"vLLM ended after {elapsed:.0f} s while starting, {obituary(process)}")
            if elapsed > self.settings.startup_timeout_s:
                raise EngineError(
                    f"vLLM was not ready after {self.settings.startup_timeout_s:g} s (startup_timeout_s), "
                    f"{last_words(process)}"
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
                f"{killed}, {obituary(process)}\nclose() the engine; load() then starts a new server"
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
