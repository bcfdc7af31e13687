"""A causal LM for the slow step: micro-batches in; hidden states out, of the scored tokens only, and their head."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.lora import base_state, goes_on, in_use, merge, parameters_of, put_on, put_on_as_read, using
from dspy_fst.engine.tree import attend_in_trees, read_tree
from dspy_fst.errors import TrainingError
from dspy_fst.model_files.architectures import context_length, last_position, load_model_with_info
from dspy_fst.model_files.folder import folder_faults, layer_fault, wrapped_names
from dspy_fst.recipe.lora_settings import SHARED, LoRA
from dspy_fst.slow.batching import MicroBatch, Scored, micro_batches
from dspy_fst.slow.head import Head, Readout, decoder_of
from dspy_fst.slow.layers import recompute_layers
from dspy_fst.slow.quantized import Kind, quantize
from dspy_fst.slow.ranks.ranks import whole

START = "start:"
"""Begins the name of the frozen copy of an adapter that goes on: the KL's reference. Adapters have no colon."""
PROBE_TOLERANCE = 1e-3
"""Largest relative gap between our logits and the model's own on the probe; float32 kernels differ by ~1e-6."""


class Policy(nn.Module):
    """Wraps a model so that a training or scoring step is one forward.

    - The body runs in float32, or in bfloat16 autocast if ``body_dtype`` is bfloat16.
    - The LM head runs in float32 (ScaleRL, 2510.13786: a float32 head lifts the asymptote from 0.52 to 0.61). It is
      applied only to the hidden states that predict a scored token.
    - Trained parameters are float32: at the learning rates of RL most updates of a bfloat16 parameter round away.
    - Dropout stays off, because training must score the distribution that was sampled from.
    - Of a multimodal model the part that reads and writes text is trained.
    - With a LoRA adapter only its parameters are trained. The weights below are frozen, and kept in ``body_dtype``.
    - The linear layers of a frozen model, as the KL's reference is one, are kept in ``body_dtype``.

    Raises:
        TrainingError: the given model holds an adapter or a parametrization. The forward reads the head's weight
            directly, so a LoRA on the head would get no gradient; and the published tensors would have names that no
            loader knows.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        _refuse_wrapped(model)
        self.model = model.eval()
        self.body_dtype = torch.float32
        self.shares_prompts = False
        """Whether a micro-batch may hold a shared prompt once; :meth:`load` sets it where the model allows it."""
        self.head = Head()
        """From the last hidden states to the logits; :meth:`load` measures it."""
        self.last_position = last_position(model.config)
        """Highest position of a text, see `architectures.last_position`; None: no limit."""
        self.context = context_length(model.config)
        """Tokens of the longest prompt plus reply that an engine serves; None: no limit."""
        self.adapters: tuple[str, ...] = ()
        """Names of its LoRA adapters. A micro-batch goes through its own, or through the only one."""
        self.started_from: dict[str, str] = {}
        """Adapter -> the frozen copy of what it was when it was loaded; one that is not here changed nothing then."""
        self.at_start = False
        """Whether micro-batches go through what the adapters were when they were loaded; see `start`."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype,
        trainable: bool = True,
        adapter: LoRA | None = None,
        names: Sequence[str] = (SHARED,),
        seed: int = 0,
        quantized: Kind | None = None,
    ) -> "Policy":
        """Load weights in float32, and check that `forward` gives the model's own logits.

        Args:
            path: A folder as `Checkpoint.at` reads it, or a hub name.
            dtype: Arithmetic of the body, float32 or bfloat16.
            trainable: Whether the text part gets gradients.
            adapter: Settings of LoRA adapters to train instead. Those that the folder holds by the same names with the
                same settings go on. Another one is merged into the weights, and so is one without this argument.
                Several are not: they are only scored with (``trainable=False``).
            names: Of the adapters.
            seed: Of new adapters' numbers.
            quantized: How linear layers below the adapters are rounded; None: not.

        Raises:
            TrainingError: the files lack some layers, `forward` does not give the model's own logits, or the adapter
                does not fit the model.
        """
        source = Checkpoint.at("start", Path(path))
        policy = cls(_whole_model(source.path))
        if adapter is None and not trainable and len(source.adapters) > 1:
            policy._put_on_as_read(source)
        elif adapter is None or not policy._goes_on(source, adapter, names):
            policy._merge(source)
        if adapter is not None and not policy.adapters:
            policy._put_on(adapter, names, seed)
        policy._set_trainable(trainable)
        with using(policy.model, policy._through(None)):  # as `forward` reads what names no adapter
            policy._probe()
        policy.body_dtype = dtype
        if adapter is not None:
            policy._store_base(dtype)
            if quantized is not None:
                quantize(policy.model, quantized)
        elif not trainable:
            policy._store_linear_layers(dtype)
        return policy

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name; tied ones appear once."""
        return {name: own for name, own in self.model.named_parameters() if own.requires_grad}

    @property
    def start(self) -> "Policy":
        """The policy as it was loaded, where LoRA adapters are trained: it shares all weights with this one."""
        other = object.__new__(Policy)  # copy.copy would make a module of its own of one that FSDP2 shares out
        other.__dict__ |= {**vars(self), "at_start": True}
        return other

    def recompute_layers(self) -> None:
        """Gradient checkpointing from now on; the gradient is the same bit for bit."""
        recompute_layers(decoder_of(self.model), lambda: using(self.model, in_use(self.model)))

    def _through(self, wanted: str | None) -> str | None:
        """The adapter in the model that a micro-batch of the adapter ``wanted`` goes through; None: none."""
        name = self.adapters[0] if wanted is None and len(self.adapters) == 1 else wanted
        return self.started_from.get(name or "") if self.at_start else name

    def adapter_norms(self) -> dict[str, float]:
        """The gradient norm of each LoRA adapter."""
        gradients = {name: [p.grad for p in parameters_of(self.model, name).values()] for name in self.adapters}
        return {
            name: float(whole(nn.utils.get_total_norm([gradient for gradient in own if gradient is not None])))
            for name, own in gradients.items()
        }

    def tensors(self, adapter: str | None = None) -> dict[str, Tensor]:
        """The model's state without its adapters, or an adapter's parameters, by their names in its file."""
        if adapter is not None:
            return {**parameters_of(self.model, adapter)}
        return base_state(self.model) if self.adapters else self.model.state_dict()

    def drop_gradients(self, used: Collection[str | None]) -> None:
        """Drop those of adapters that no micro-batch went through: ranks that hold parts of them have zeros there."""
        for name in self.adapters if len(self.adapters) > 1 else ():
            if name not in used:
                for parameter in parameters_of(self.model, name).values():
                    parameter.grad = None

    def check_same_model(self, reference: "Policy", path: str | Path) -> None:
        """
        Args:
            reference: A frozen policy that the KL is measured to.
            path: Where it was read from.

        Raises:
            TrainingError: it is another kind of model, or has another vocabulary.
        """
        wanted, found = (part.model.config.get_text_config() for part in (self, reference))
        if (wanted.model_type, wanted.vocab_size) != (found.model_type, found.vocab_size):
            raise TrainingError(
                f"the reference {path} is a {found.model_type!r} of {found.vocab_size} tokens, "
                f"the policy a {wanted.model_type!r} of {wanted.vocab_size}; the KL needs an earlier state of the same "
                "model"
            )

    def logits(self, batch: MicroBatch) -> Tensor:
        """Float32 logits, shape (N, V): one row for every scored token of the micro-batch."""
        hidden = self(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(self._linear, hidden)

    def readout(self, batch: MicroBatch) -> Readout:
        """The same without the logits: what :mod:`dspy_fst.slow.head` reads them from, a chunk at a time."""
        return Readout(self.head, self._linear, self(batch))

    def forward(self, batch: MicroBatch) -> Tensor:
        """The last hidden states that predict the scored tokens, shape (N, d)."""
        device = batch.ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.body_dtype == torch.bfloat16):
            return self._read(batch).index_select(0, batch.predict_at)

    @property
    def _linear(self) -> nn.Linear:
        linear: nn.Linear = self.model.get_output_embeddings()
        return linear

    def _read(self, batch: MicroBatch) -> Tensor:
        """Last hidden states, shape (positions, d), padding included."""
        with using(self.model, self._through(batch.adapter)):
            return self._hidden_through_adapter(batch)

    def _hidden_through_adapter(self, batch: MicroBatch) -> Tensor:
        decoder = decoder_of(self.model)
        if batch.tree is not None:
            return read_tree(decoder, batch.ids, batch.tree).flatten(0, 1)
        hidden: Tensor = decoder(input_ids=batch.ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def _set_trainable(self, trainable: bool) -> None:
        """Give the text part gradients; a vision or audio tower, which no text passes through, gets none."""
        self.model.requires_grad_(False)
        if self.adapters:
            for name in self.adapters:
                for parameter in parameters_of(self.model, name).values():
                    parameter.requires_grad_(trainable)
            return
        for part in (decoder_of(self.model), self.model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(trainable)

    def _goes_on(self, source: Checkpoint, wanted: LoRA, names: Sequence[str]) -> bool:
        """Put the adapters of a folder on the model if they are the wanted ones; tell whether they were."""
        held = {adapter.name: adapter.path for adapter in source.adapters}
        if held.keys() != {*names} or not all(goes_on(self.model, path, wanted) for path in held.values()):
            return False
        self._put_on_as_read(source)
        self.started_from = {name: f"{START}{name}" for name in names}
        for name, copied in self.started_from.items():
            put_on_as_read(self.model, copied, held[name])
        return True

    def _put_on_as_read(self, source: Checkpoint) -> None:
        for adapter in source.adapters:
            put_on_as_read(self.model, adapter.name, adapter.path)
        self.adapters = tuple(adapter.name for adapter in source.adapters)

    def _merge(self, source: Checkpoint) -> None:
        if len(source.adapters) > 1:
            raise TrainingError(
                f"{source.folder} holds {len(source.adapters)} LoRA adapters, for different predictors, and one set of "
                "weights cannot hold them all; go on with the same adapters"
            )
        for adapter in source.adapters:
            merge(self.model, adapter.path)

    def _put_on(self, adapter: LoRA, names: Sequence[str], seed: int) -> None:
        """Put new adapters on the model."""
        self.adapters = tuple(names)
        for name in names:
            put_on(self.model, name, adapter, seed=named_seed(seed, name))

    def _store_base(self, dtype: torch.dtype) -> None:
        """Keep the frozen weights in the precision in which they are published, as the engine does."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)

    def _store_linear_layers(self, dtype: torch.dtype) -> None:
        """Keep frozen linear layers in the precision to which autocast rounds them at each use: no bit changes.

        The head computes in float32. Embeddings and norms make the hidden states float32. Fused experts are not rounded
        by autocast (torch 2.13). These stay as they are.
        """
        head = self.model.get_output_embeddings()
        for module in decoder_of(self.model).modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                module.to(dtype)

    @torch.no_grad()
    def _probe(self) -> None:
        """Compare `forward` with the model's own logits; allow shared prompts where these give the same logits."""
        kind = f"model type {self.model.config.model_type!r} cannot be trained"
        vocabulary = self.model.get_input_embeddings().num_embeddings
        texts = [((1, 2, 3, 4, 5, 2, 3), 3), ((1, 2, 3, 6, 7, 8), 3), ((9, 1, 5, 3), 2), ((1, 2, 3, 4), 3)]
        texts = [(tuple(token % vocabulary for token in text), start) for text, start in texts]
        try:
            self.head = Head.of(self.model)
            plain = torch.cat(
                [self.model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1] for ids, start in texts]
            )
            gap = self._gap(texts, plain, share=False)
            early = self.model(torch.tensor([texts[0][0][:4]]), use_cache=False).logits[0, 2:]
            # Windowed, recurrent and hybrid models do not cache the keys and values of every token.
            cache = self.model(torch.tensor([texts[0][0]]), use_cache=True).get("past_key_values")
        except TrainingError:
            raise
        except Exception as error:  # a model's own code may fail in any way
            raise TrainingError(
                f"{kind}: scoring a few tokens with it failed ({type(error).__name__}: {error}); choose a causal "
                "language model that transformers can run by itself"
            ) from error
        if not float((early - plain[:2]).abs().max() / plain.abs().max().clamp(min=1e-6)) <= PROBE_TOLERANCE:
            raise TrainingError(
                f"{kind}: its logits for a token depend on later tokens, so it cannot sample what it scores; "
                "choose a causal language model"
            )
        if not gap <= PROBE_TOLERANCE:
            raise TrainingError(
                f"{kind}: its logits differ from those of its head over its hidden states by {gap:.2g} of their size; "
                "choose a model with a plain LM head"
            )
        plain_cache = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        self.shares_prompts = plain_cache and attend_in_trees(self.model) and self._reads_trees(texts, plain)

    def _reads_trees(self, texts: list[tuple[tuple[int, ...], int]], plain: Tensor) -> bool:
        """Whether the model gives the same logits where what texts have in common is read once."""
        try:
            return self._gap(texts, plain, share=True) <= PROBE_TOLERANCE
        except Exception:  # a model's own attention may not take a tree, and fail in any way
            return False

    def _gap(self, texts: list[tuple[tuple[int, ...], int]], plain: Tensor, *, share: bool) -> float:
        """Largest gap to the model's own logits at the scored tokens, relative to the largest logit."""
        (batch,) = micro_batches([Scored(ids, start) for ids, start in texts], 1000, share=share)
        rows = dict(zip(batch.members, self.logits(batch).split(batch.tokens), strict=True))
        ours = torch.cat([rows[index] for index in range(len(texts))])
        return float((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-6))


def named_seed(seed: int, adapter: str) -> int:
    """The seed of an adapter's first numbers: another one for each adapter of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed} LoRA adapter {adapter}".encode()).digest()[:4], "big")


def _whole_model(path: Path) -> PreTrainedModel:
    if faults := list(folder_faults(path)):
        raise TrainingError(f"{path}: {'; '.join(faults)}")
    model, loading_info = load_model_with_info(path, dtype=torch.float32)
    if fault := layer_fault(loading_info):
        raise TrainingError(f"{path}: {fault}")
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    if found := wrapped_names(name for name, _ in model.named_modules()):
        raise TrainingError(
            f"the model holds an adapter or a parametrization ({found[0]}), and the trainer trains whole weights; "
            "merge it (merge_and_unload) and give the merged model"
        )
