"""A tiny random model with a real tokenizer: one text has many spellings in its vocabulary, as in any model's."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from programs import smollm2

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS_THOUGHTS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]").replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
"""As those of many models that think: it opens the thoughts, and leaves those of earlier turns out."""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""In the words of Gemma's and Mistral's first templates."""
DROPS_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)


TEMPLATE = "chat_template.jinja"


def save_model(
    folder: Path, template: str | None = CHATML, *, seed: int = 0, peak: float = 0.02, **eos: object
) -> Path:
    """Write a Qwen3 of 3M parameters with SmolLM2's vocabulary.

    Args:
        template: The chat template; None leaves none.
        peak: Standard deviation of the weights: how far from uniform it samples.
        eos: ``eos_token_id`` and other settings of the config.
    """
    made = _made(seed, peak, tuple(eos.items()))
    shutil.copytree(made.name, folder, dirs_exist_ok=True)
    if template is None:
        (folder / TEMPLATE).unlink()
    else:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    return folder


@cache
def _made(seed: int, peak: float, eos: tuple[tuple[str, object], ...]) -> tempfile.TemporaryDirectory[str]:
    """The folder, kept for the next: to read and write a real tokenizer takes half a second."""
    folder = tempfile.TemporaryDirectory(prefix="real-tokenizer-")
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=peak,
        **{"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None, **dict(eos)},
    )
    Qwen3ForCausalLM(config).eval().save_pretrained(folder.name)
    tokenizer.save_pretrained(folder.name)
    return folder
