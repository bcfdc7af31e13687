"""The endpoints of a vLLM server for LoRA adapters: loading, unloading and comparing them (vLLM 0.32)."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from dspy_fst.engine.base import Holding
from dspy_fst.engine.vllm.client import QUICK_TIMEOUT_S, VLLMClient
from dspy_fst.engine.vllm.wire import ABSENT, GATEWAY, read_holding, require_success, said
from dspy_fst.errors import EngineError, NoAnswerError

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class LoRAClient:
    """The LoRA adapters of one server. Thread-safe.

    Args:
        client: The server.
        there: Where it finds a folder of this machine.
    """

    def __init__(self, client: VLLMClient, there: Callable[[Path], Path] = Path):
        self._client, self._there = client, there
        self.extended = False
        """Whether the server's workers have our extension, which `note_names` finds out."""

    def require(self, how_to_launch: str) -> None:
        """Check that the server can load LoRA adapters while it runs. Nothing is loaded.

        Raises:
            EngineError: it cannot; with ``how_to_launch`` in the message.
        """
        # It refuses the name of the model itself by 400, before it looks at anything else.
        body = {"lora_name": self._client.find_model(), "lora_path": "none"}
        reply = self._client.send("POST", _LOAD, json=body, timeout_s=QUICK_TIMEOUT_S)
        if reply.status_code in ABSENT:
            raise EngineError(
                f"vLLM at {self._client.address.url} was launched without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, so it "
                f"cannot load LoRA adapters while it runs. {how_to_launch}"
            )
        if reply.status_code in GATEWAY:
            require_success(reply, f"POST {self._client.address.url}{_LOAD}")

    def note_names(self, how_to_launch: str, *, optional: bool) -> None:
        """Let the workers note under which name each adapter is loaded from now on, for `held`.

        Args:
            how_to_launch: Told in the error.
            optional: Whether a server without our extension (`engine/vllm/served/dspy_fst_weight_check.py`) will do.

        Raises:
            EngineError: the server was launched without LoRA, lacks the extension, or did not answer.
        """
        workers = self._client.run("dspy_fst_note_loras", optional=optional)
        self.extended = workers is not None
        if workers is not None and not all(workers):
            raise EngineError(f"vLLM at {self._client.address.url} was launched without --enable-lora. {how_to_launch}")

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter under a new name, beside the requests in flight.

        A lost answer is no failure: the server is asked which names it has, and again if it lacks this one.

        Raises:
            EngineError: the server refused it, or did not answer.
        """
        there = str(self._there(folder))
        body = {"lora_name": name, "lora_path": there}
        for last in (False, True):
            try:
                self._client.call("POST", _LOAD, json=body, timeout_s=self._client.load_timeout_s)
                return
            except EngineError as error:
                with suppress(EngineError):
                    if self.folders().get(name) == there:
                        return
                if last or not isinstance(error, NoAnswerError):
                    raise

    def unload(self, name: str) -> None:
        """Unload an adapter that no request uses any more, and free its memory.

        Raises:
            EngineError: the server refused it, or did not answer.
        """
        self._client.call("POST", _UNLOAD, json={"lora_name": name}, timeout_s=QUICK_TIMEOUT_S)
        if self.extended:
            self._client.run("dspy_fst_forget_lora", name=name)

    def folders(self) -> Mapping[str, str]:
        """Name on the server -> folder, of every adapter that is loaded.

        Raises:
            EngineError: the server did not answer.
        """
        models = said(self._client.call("GET", "/v1/models", timeout_s=QUICK_TIMEOUT_S))["data"]
        return {str(model["id"]): str(model.get("root")) for model in models if model.get("parent")}

    def held(self, name: str, folder: Path) -> Holding:
        """Let every worker compare the adapter that requests for ``name`` use with a peft folder's tensors.

        Raises:
            EngineError: the check failed; `VLLMClient.held` tells when it would fail again.
        """
        there = str(self._there(folder))
        return read_holding(self._client.run("dspy_fst_compare_lora", name=name, folder=there) or [])
