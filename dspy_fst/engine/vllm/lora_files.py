"""What vLLM must be started with for a version's LoRA adapters, and why it could not serve them, from their files.

vLLM answers 500 to an adapter that it does not support, which a client cannot tell from a fault of the server. So the
files are read here first. The rules are those of vLLM 0.32 (`lora/peft_helper.py`, `lora/utils.py`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from dspy_fst.engine.base import AdapterFiles
from dspy_fst.errors import EngineError
from dspy_fst.model_files.lora_folder import CONFIG, TENSORS

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` that vLLM 0.32 takes (`config/lora.py`)."""
HEAD = "lm_head"
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of ``init_lora_weights`` under which the saved adapter belongs to the unchanged base."""
_UNKNOWN = (
    *("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens", "layer_replication"),
    *("use_bdlora", "use_qalora", "trainable_token_indices"),
)
"""Settings of peft that vLLM does not support; of the last it does not say so."""
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class LoRANeeds:
    """What a server must be started with to serve LoRA adapters."""

    adapters: int
    """Number of adapters of one version."""
    rank: int
    """Highest rank of a layer, rounded up to one of `RANKS`."""
    modules: frozenset[str]
    """Last parts of the names of the adapted layers, e.g. ``{"q_proj", "up_proj"}``."""

    @classmethod
    def of(cls, adapters: Sequence[AdapterFiles]) -> "LoRANeeds":
        """What these adapters need together.

        Raises:
            EngineError: vLLM cannot serve some of them; all reasons are named.
        """
        read = [_Adapter.read(adapter) for adapter in adapters]
        if faults := [fault for each in read for fault in each.faults()]:
            raise EngineError(f"vLLM cannot serve {'; nor '.join(faults)}")
        rank = max(each.rank for each in read)
        modules = frozenset[str]().union(*(each.modules for each in read))
        return cls(len(read), next(offered for offered in RANKS if offered >= rank), modules)

    def beyond(self, other: "LoRANeeds") -> str | None:
        """Why a server that was started for ``other`` cannot serve these; None if it can."""
        if self.rank > other.rank:
            return f"their rank {self.rank} is above the {other.rank} that it was started with"
        if unknown := sorted(self.modules - other.modules):
            return f"it was started without LoRA on {', '.join(unknown)}"
        return None


@dataclass(frozen=True)
class _Adapter:
    """What is read of one adapter."""

    files: AdapterFiles
    config: Mapping[str, object]
    tensors: tuple[str, ...]

    @classmethod
    def read(cls, files: AdapterFiles) -> "_Adapter":
        try:
            config = json.loads((files.path / CONFIG).read_text(encoding="utf-8"))
            with safe_open(files.path / TENSORS, framework="pt") as file:
                return cls(files, config, tuple(file.keys()))
        except (OSError, ValueError, SafetensorError) as error:
            raise EngineError(f"LoRA adapter {files.name!r}: {files.path} cannot be read: {error}") from error

    @property
    def rank(self) -> int:
        ranks = self.config.get("rank_pattern") or {}
        own = self.config.get("r")
        return max(
            rank for rank in (own, *(ranks.values() if isinstance(ranks, Mapping) else ())) if isinstance(rank, int)
        )

    @property
    def modules(self) -> frozenset[str]:
        paths = [name.removesuffix(part) for name in self.tensors for part in _PARTS if name.endswith(part)]
        experts = {"experts"} if any(".experts" in path for path in paths) else set[str]()
        return frozenset({path.rpartition(".")[2] for path in paths} | experts)

    def faults(self) -> list[str]:
        reasons = "; ".join(self._reasons())
        return [f"LoRA adapter {self.files.name!r} at {self.files.path}: {reasons}"] if reasons else []

    def _reasons(self) -> Iterator[str]:
        config = self.config
        if (kind := config.get("peft_type")) != "LORA":
            yield f"it is of the kind {kind}, not LORA"
            return
        for name in _UNKNOWN:
            if value := config.get(name):
                yield f"it was made with {name}={value!r}, which vLLM does not support"
        if (bias := config.get("bias", "none")) != "none":
            yield f"it was made with bias={bias!r}, and vLLM adapts no biases"
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            yield f"it was made with init_lora_weights={start!r}, which changes the base that it belongs to"
        if not isinstance(config.get("r"), int) or self.rank < 1:
            yield f"its rank is {config.get('r')!r}"
        elif self.rank > RANKS[-1]:
            yield f"its rank is {self.rank}, and vLLM's limit is {RANKS[-1]}"
        if strange := [name for name in self.tensors if not name.endswith(_PARTS)]:
            yield f"it holds tensors that are no plain LoRA, such as {strange[0]}"
        if not self.tensors:
            yield "it holds no tensor"
