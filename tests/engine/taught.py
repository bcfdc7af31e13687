"""A tiny Qwen3 that was taught its replies by heart, in seconds, so that it really thinks and calls tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dspy import lm15
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from dspy_fst.engine.chat import chat_messages, chat_options

END, VOCABULARY = "<|end|>", 640
SPECIAL = [END, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
THINKS = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
TEMPLATE = (
    "{% if tools %}<|system|>Tools:{% for tool in tools %}\n{{ tool.function.name }} "
    "{{ tool.function.parameters.properties.keys() | list | tojson }}{% endfor %}" + END + "{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}" + THINKS + "{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shows tools, thoughts, calls and results in a few words."""


class Script:
    """DSPy's engine contract: gives the parts in turn, and notes what it was asked."""

    supports_function_calling = supports_reasoning = True

    def __init__(self, *replies: lm15.TextPart | lm15.ToolCallPart):
        self.replies, self.asked = list(replies), list[lm15.Request]()

    def complete(self, request: lm15.Request) -> lm15.Response:
        self.asked.append(request)
        message = lm15.Message(role="assistant", parts=(self.replies[len(self.asked) - 1],))
        return lm15.Response(id=None, model="m", message=message, finish_reason="stop", usage=lm15.Usage())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Script":
        return self


@dataclass(frozen=True)
class Lesson:
    """A request and the reply to it; of two lessons with one request, the model learns to give either."""

    request: lm15.Request
    reply: str


def make_tokenizer(texts: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """Byte pairs learnt from the texts; the tags are tokens that a decoder does not skip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS), special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>")
    fast.chat_template = template
    return fast


def teach(path: Path, lessons: Sequence[Lesson], *, template: str = TEMPLATE, steps: int = 60) -> Path:
    """Write a Hugging Face folder of a model that gives the replies of the lessons."""
    texts = [_rendered(template, lesson) for lesson in lessons]
    tokenizer = make_tokenizer(texts, template)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config)
    batch = _batch(tokenizer, texts, [lesson.reply for lesson in lessons])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        (loss := model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3, "the model did not learn its lessons"
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _rendered(template: str, lesson: Lesson) -> str:
    """The prompt of a lesson with its reply, as text."""
    options = chat_options(lesson.request)
    (prompt,), _ = render_jinja_template(
        [chat_messages(lesson.request)], chat_template=template, add_generation_prompt=True, **options
    )
    return f"{prompt}{lesson.reply}{END}"


def _batch(tokenizer: Any, texts: Sequence[str], replies: Sequence[str]) -> dict[str, torch.Tensor]:
    """Ids padded on the right; only replies are learnt."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (whole, reply) in enumerate(zip(rows, replies, strict=True)):
        said = slice(len(whole) - len(tokenizer(reply + END)["input_ids"]), len(whole))
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, said] = ids[row, said]
    return {"input_ids": ids, "labels": labels}
