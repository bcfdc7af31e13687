"""What the slow step leaves on disk: published policies for engines, and its own state to go on from.

Both appear whole or not at all: written beside their place, flushed to the disk, renamed.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Read from transformers 5.19. Undoes the renaming and fusing of from_pretrained (experts, for one): save_pretrained
# does it too, but costs three times the writing of a small model.
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from dspy_fst.engine.vllm.served.dspy_fst_weight_check import digest
from dspy_fst.errors import TrainingError
from dspy_fst.model_files.folder import wrapped_names
from dspy_fst.run.files import flush, scratch_beside
from dspy_fst.slow.rendered import rendering_fault

STATE_FORMAT = 1


PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extraction_config.json", "chat_template.json"),
)
"""What shapes the prompts of multimodal models, beside the tokenizer's own files (names of transformers 5.19)."""


class Publisher:
    """Writes a model's weights as the folder an engine serves; all but the weights is prepared once.

    Args:
        source: Folder or hub name that the tokenizer was read from; its processor's files are carried as they are.

    Raises:
        TrainingError: the files that would be published render prompts that the tokenizer does not.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, source: str | Path
    ):
        self._model, self._dtype = model, dtype
        self._texts = _texts(model, tokenizer, dtype) | _processor_files(source)
        _check_rendering(self._texts, tokenizer)

    def write(self, path: Path) -> dict[str, str]:
        """Write ``path``: weights, config, generation config, tokenizer, templates; embeddings always untied.

        Tied embeddings are written twice, because vLLM on the CPU serves its pre-packed copy of a tied LM head
        after a reload: stale weights, and no complaint.

        Returns:
            The digest of every tensor, taken in memory: what a reader of the folder must find.

        Raises:
            TrainingError: ``path`` exists, or the model came to hold an adapter.
        """
        with written_whole(path) as scratch:
            _write_files(scratch, self._texts)
            tensors = self._tensors()
            if found := wrapped_names(iter(tensors)):
                raise TrainingError(
                    f"{found[0]} is a tensor of an adapter or a parametrization, which no loader of whole weights "
                    "knows; merge it before training"
                )
            save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        return {name: digest(tensor) for name, tensor in tensors.items()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self._model.state_dict().items():
            shared = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            kept = tensor.to("cpu", self._dtype if tensor.is_floating_point() else tensor.dtype)
            tensors[name] = kept.clone() if shared else kept
        return {name: t.contiguous() for name, t in revert_weight_conversion(self._model, tensors).items()}


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, bytes]:
    """Path below the folder -> content of everything in a published folder that training does not change."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    config.dtype = dtype
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        # Written without transformers' validation: many published generation configs would not pass it.
        model.generation_config.to_json_file(Path(scratch) / "generation_config.json")
        files = [file for file in Path(scratch).rglob("*") if file.is_file()]  # named templates lie in a folder
        texts = {file.relative_to(scratch).as_posix(): file.read_bytes() for file in files}
    # to_json_string leaves out what equals the model class's default; these two an engine must not guess.
    described = json.loads(config.to_json_string())
    described |= {"tie_word_embeddings": False, "architectures": [type(model).__name__]}
    return texts | {"config.json": _json(described)}


def _processor_files(source: str | Path) -> dict[str, bytes]:
    absent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = {name: cached_file(source, name, **absent) for name in PROCESSOR_FILES}
    return {name: Path(path).read_bytes() for name, path in found.items() if path is not None}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _check_rendering(files: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the tokenizer back from what will be published, and compare the prompts that both make."""
    with tempfile.TemporaryDirectory() as scratch:
        _write_files(Path(scratch), files)
        published = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        if fault := rendering_fault(tokenizer, published):
            raise TrainingError(f"the weights are not published: {fault}")


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write training state as safetensors and JSON."""
    with written_whole(path) as scratch:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / "state.safetensors")
        (scratch / "state.json").write_bytes(_json({"format": STATE_FORMAT, **facts}))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_state` wrote.

    Raises:
        TrainingError: there is none, it cannot be read, or another release wrote it.
    """
    try:
        facts = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"no training state can be read from {path}: {error}") from error
    if facts.get("format") != STATE_FORMAT:
        raise TrainingError(
            f"{path / 'state.json'} has format {facts.get('format')!r}, this release reads {STATE_FORMAT}; "
            "go on with the release that wrote it"
        )
    return tensors, facts


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises:
        TrainingError: ``path`` exists.
    """
    if path.exists():
        raise TrainingError(f"{path} exists already and is never overwritten; choose another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(path) as scratch:
        yield scratch
        for written in (*scratch.rglob("*"), scratch):
            flush(written)
        scratch.rename(path)
        flush(path.parent)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
