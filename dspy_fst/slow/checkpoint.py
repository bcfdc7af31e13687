"""What the slow step writes to disk: published policies for engines, and the training state that a run resumes from.

Both are whole or absent: each is written beside its place, flushed to the disk, and renamed.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Read from transformers 5.19. It undoes the renaming and fusing of from_pretrained, e.g. of experts. save_pretrained
# does the same, but takes three times as long to write a small model.
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from dspy_fst.engine.base import AdapterFiles, Checkpoint
from dspy_fst.engine.chat import rendered_ids
from dspy_fst.engine.lora import merge, write
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import digest
from dspy_fst.errors import TrainingError
from dspy_fst.model_files.folder import wrapped_names
from dspy_fst.model_files.lora_folder import BESIDE, INDEX, INSIDE, index_of
from dspy_fst.model_files.reading import read_tokenizer
from dspy_fst.run.files import DCP_METADATA, flush, scratch_beside, sha256_of
from dspy_fst.slow.adamw import moments_of
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.parts import read_parts
from dspy_fst.slow.ranks.sharding import part_for
from dspy_fst.types import WeightsVersion

STATE_FORMAT, PARTS_FORMAT = 1, 2
"""Of a state in one file, and of one in parts."""
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extraction_config.json", "chat_template.json"),
)
"""Files that shape the prompts of multimodal models, beside the tokenizer's own (names of transformers 5.19)."""
Read = Callable[[str | None], Mapping[str, Tensor]]
"""The weights without adapters, or those of an adapter, by name."""
Message = dict[str, object]
Prompt = list[int] | str
"""Token ids, or the name of the exception that the template raises."""
TOOL: Message = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
QUESTION = "What is  a\nlynx? é 1234"
SYSTEM: Message = {"role": "system", "content": "Be brief."}
USER: Message = {"role": "user", "content": QUESTION}
CALL: Message = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "lynx"}}}
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [USER],
    "a system prompt and one turn": [SYSTEM, USER],
    "three turns": [SYSTEM, USER, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "How big?"}],
    "a tool's call and result": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look_up", "content": "a cat"},
    ],
}


class CheckpointWriter:
    """Writes a model's weights as a folder that an engine serves. Everything but the weights is prepared once.

    Args:
        model: The model that is trained.
        tokenizer: Its tokenizer.
        dtype: Type of the published weights.
        source: Folder or hub name that the tokenizer was read from; its processor's files are copied unchanged.
        read: Gives what is to be written, see `Policy.tensors`.

    Raises:
        TrainingError: the files to publish would render other prompts than the tokenizer does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        source: str | Path,
        read: Read,
    ):
        self._model, self._dtype, self._read = model, dtype, read
        self._base_digests: dict[str, str] | None = None
        """Of the base below a LoRA adapter, once it is known to be written."""
        self._static = _static_files(model, tokenizer, dtype) | _processor_files(source)
        _check_rendering(self._static, tokenizer)

    def write(self, path: Path) -> dict[str, str]:
        """Write ``path``: weights, config, generation config, tokenizer and templates; embeddings always untied.

        Tied embeddings are written twice. Otherwise vLLM on a CPU would go on to serve its packed copy of a tied LM
        head after a reload: stale weights, without an error.

        Returns:
            Tensor -> its digest, taken in memory; a reader of the folder must find the same.

        Raises:
            TrainingError: ``path`` exists, or an adapter was put on the model since it was loaded.
        """
        return self._write(path, self._read(None))

    def write_adapters(
        self, path: Path, version: WeightsVersion, names: Sequence[str], predictors: Mapping[str, str]
    ) -> Checkpoint:
        """Write ``path`` with the model's LoRA adapters of these names. The base beside it is written once.

        Args:
            predictors: Predictor -> its adapter; empty where all share one.

        Raises:
            TrainingError: ``path`` exists.
        """
        base = path.parent / INSIDE
        if self._base_digests is None:
            whole = self._read(None)
            self._base_digests = self._digests(whole) if base.exists() else self._write(base, whole)
        with written_whole(path) as scratch:
            written = {name: write(self._model, name, self._read(name), scratch / name) for name in names}
            (scratch / INDEX).write_bytes(_json(index_of(BESIDE, names, predictors)))
        adapters = tuple(
            AdapterFiles(name, path / name, {key: digest(tensor) for key, tensor in tensors.items()})
            for name, tensors in written.items()
        )
        return Checkpoint(version, base, self._base_digests, adapters, predictors)

    def _write(self, path: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
        with written_whole(path) as scratch:
            _write_files(scratch, self._static)
            tensors = self._tensors(state)
            if wrapped := wrapped_names(iter(tensors)):
                raise TrainingError(
                    f"{wrapped[0]} is a tensor of an adapter or a parametrization, which no loader of whole weights "
                    "knows; merge it before training"
                )
            save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        return {name: digest(tensor) for name, tensor in tensors.items()}

    def _digests(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: digest(tensor) for name, tensor in self._tensors(state).items()}

    def _tensors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in state.items():
            shared = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            converted = tensor.to("cpu", self._dtype if tensor.is_floating_point() else tensor.dtype)
            tensors[name] = converted.clone() if shared else converted
        return {name: t.contiguous() for name, t in revert_weight_conversion(self._model, tensors).items()}


def write_merged(source: Path, folder: Path, adapter: str | None = None) -> None:
    """Write weights with a LoRA adapter as whole weights in float32, into a folder that exists.

    Args:
        source: A folder as `Checkpoint.at` reads it.
        adapter: Which adapter, where there are several; see `Checkpoint.adapter`.

    Raises:
        TrainingError: the weights cannot be read, or do not fit each other.
    """
    held = Checkpoint.at("merged", source)
    chosen, base = held.adapter(adapter), held.path
    policy = Policy.load(base, dtype=torch.float32, trainable=False)
    if chosen is not None:
        merge(policy.model, chosen.path)
    tokenizer = read_tokenizer(base)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch) / "whole"
        CheckpointWriter(policy.model, tokenizer, torch.float32, base, policy.tensors).write(whole)
        for path in whole.iterdir():
            path.rename(folder / path.name)


def _static_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> dict[str, bytes]:
    """Path below the published folder -> content, for every file that training does not change."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    config.dtype = dtype
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        # Written without transformers' validation, which many published generation configs would not pass.
        model.generation_config.to_json_file(Path(scratch) / "generation_config.json")
        written = [file for file in Path(scratch).rglob("*") if file.is_file()]  # named templates are in a subfolder
        files = {file.relative_to(scratch).as_posix(): file.read_bytes() for file in written}
    # to_json_string leaves out values that equal the model class's default. An engine must not guess these two.
    described = json.loads(config.to_json_string())
    described |= {"tie_word_embeddings": False, "architectures": [type(model).__name__]}
    return files | {"config.json": _json(described)}


def _processor_files(source: str | Path) -> dict[str, bytes]:
    lenient = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    paths = {name: cached_file(source, name, **lenient) for name in PROCESSOR_FILES}
    return {name: Path(path).read_bytes() for name, path in paths.items() if path is not None}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _check_rendering(files: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the tokenizer from the files to publish, and compare its prompts with the given tokenizer's."""
    with tempfile.TemporaryDirectory() as scratch:
        _write_files(Path(scratch), files)
        published = read_tokenizer(scratch)
        if fault := rendering_fault(tokenizer, published):
            raise TrainingError(f"the weights are not published: {fault}")


def rendering_fault(base: PreTrainedTokenizerBase, published: PreTrainedTokenizerBase) -> str | None:
    """The first prompt whose token ids differ, with both lengths in tokens; None when every prompt is the same."""
    wanted, rendered = dict(_prompts(base)), dict(_prompts(published))
    for what in [*wanted, *(name for name in rendered if name not in wanted)]:
        if (ours := wanted.get(what)) != (theirs := rendered.get(what)):
            return (
                f"its files make another prompt of {what} than the model that training started from: "
                f"{_summary(theirs)} instead of {_summary(ours)}; save the start's tokenizer again with this "
                "transformers and compare both"
            )
    return None


def _summary(prompt: Prompt | None) -> str:
    if prompt is None:
        return "no prompt"
    return f"an error ({prompt})" if isinstance(prompt, str) else f"{len(prompt)} tokens"


def _prompts(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Prompt]]:
    """Each conversation in words, and its prompt."""
    special = " ".join(str(token) for token in tokenizer.all_special_tokens)
    for text in (QUESTION, special):
        yield f"the text {text[:40]!r}", list(tokenizer(text)["input_ids"])
    templates = tokenizer.chat_template
    names = sorted(templates) if isinstance(templates, dict) else [None]
    if templates is None:
        return
    for name in (None, *names) if names != [None] else names:
        for what, messages in CONVERSATIONS.items():
            for tools in (None, [TOOL]):
                where = f"{what}{' with tools' if tools else ''}{f' in the template {name!r}' if name else ''}"
                yield where, _rendered(tokenizer, messages, tools, name)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Message] | None, template: str | None
) -> Prompt:
    try:
        return rendered_ids(tokenizer, messages, tools=tools, chat_template=template, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a conversation with any exception
        return type(error).__name__


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, int]) -> None:
    """Write training state as the new folder ``path``: tensors as safetensors, facts as JSON.

    Raises:
        TrainingError: ``path`` exists.
    """
    with written_whole(path) as scratch:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / "state.safetensors")
        (scratch / "state.json").write_bytes(_json({"format": STATE_FORMAT, **facts}))


def write_state_in_parts(path: Path, write: Callable[[Path], None], facts: Mapping[str, int]) -> None:
    """The same, of which each rank writes a share of the tensors.

    Args:
        write: Writes them into a folder, and returns when all ranks have; see `Ranks.in_parts`.

    Raises:
        TrainingError: ``path`` exists.
    """
    with written_whole(path) as scratch:
        write(scratch)
        (scratch / "state.json").write_bytes(_json({"format": PARTS_FORMAT, **facts}))


def read_state(path: Path, shares: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors and facts that :func:`write_state` wrote, or :func:`write_state_in_parts`.

    Args:
        shares: The trained parameters by name. Of a state in parts, what these have a share of is read as such.

    Raises:
        TrainingError: there is no state, it cannot be read, or another release wrote it.
    """
    try:
        facts: dict[str, int] = json.loads((path / "state.json").read_text())
        if (found := facts.get("format")) not in (STATE_FORMAT, PARTS_FORMAT):
            raise TrainingError(
                f"{path / 'state.json'} has format {found!r}, this release reads {STATE_FORMAT} and {PARTS_FORMAT}; "
                "go on with the release that wrote it"
            )
        in_parts = found == PARTS_FORMAT
        tensors = read_parts(path, shares) if in_parts else load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"no training state can be read from {path}: {error}") from error
    return tensors, facts


def parts_digest(path: Path) -> str:
    """What tells a state in parts from another, in words: its metadata names the save. The same for all in one file."""
    try:
        return f"parts of checksum {sha256_of(path / DCP_METADATA)[:12]}"
    except OSError:
        return "one file"


def state_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Tensor]:
    """All tensors that an update reads or changes: weights, moments and torch's generators.

    Args:
        parameters: The trained parameters by name.
    """
    tensors: dict[str, Tensor] = {f"weights/{name}": parameter for name, parameter in parameters.items()}
    tensors |= moments_of(parameters, optimizer)
    tensors["generator/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["generator/cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def stored_shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Name of each parameter in a state -> its shape."""
    of_weights = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("weights/")}
    return {name.removeprefix("weights/"): shape for name, shape in of_weights.items()}


@torch.no_grad()
def restore_weights(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy a state's weights into the parameters, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(part_for(parameter, tensors[f"weights/{name}"]))


def restore_generators(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to a state's."""
    torch.set_rng_state(tensors["generator/cpu"])
    if "generator/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator/cuda"], device)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``path`` when the block succeeds, and is removed when it raises.

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


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
