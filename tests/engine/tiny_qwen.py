"""A random Qwen3 of 0.2M parameters with a byte-level tokenizer and a chat template, made on the spot."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.vllm.server_settings import VLLMSettings

END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 640
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, special tokens, and filler words up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [END, "<|pad|>", *ROLES]
    tokens = [*special, *alphabet]
    tokens += [f"<w{i}>" for i in range(VOCABULARY - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int, *, tied: bool = False) -> Qwen3ForCausalLM:
    """Weights drawn wide enough that the distribution is far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
        initializer_range=0.15,
    )
    return Qwen3ForCausalLM(config).eval()


def small(log: Path | None = None) -> VLLMSettings:
    """Of a server for a model so small, whose output goes to a file."""
    return VLLMSettings(cpu_kv_cache_gib=1, startup_timeout_s=900, request_timeout_s=60, log_path=log)


def save(model: Qwen3ForCausalLM, folder: Path, version: str) -> Checkpoint:
    """Write the model and its tokenizer; the folder is named after the version."""
    path = folder / version
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return Checkpoint(version=version, path=path)


def untied(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same function with an output head of its own."""
    config = Qwen3Config.from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    other = Qwen3ForCausalLM(config).eval()
    weights = dict(model.state_dict())
    weights["lm_head.weight"] = model.get_input_embeddings().weight.detach().clone()
    other.load_state_dict(weights)
    return other


@torch.no_grad()
def rescore(model: Qwen3ForCausalLM, sequence: list[int], *, temperature: float = 1.0) -> list[float]:
    """Log-probability of every token but the first, in float32."""
    logits = model(torch.tensor([sequence])).logits[0, :-1].float() / temperature
    chosen = torch.tensor(sequence[1:])[:, None]
    return torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0].tolist()
