"""The base model's tokenizer: a byte-level BPE in which every fixed piece of `dspy.ChatAdapter`'s prompt is one token.

Words are at most one token, digits always exactly one, and any other Unicode text falls back to bytes. Text is
lower-cased on the way in, so that a word is the same token wherever it stands in a sentence.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import dspy
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 1024
"""Upper bound; the shipped tokenizer needs fewer."""

CONTEXT = 1024
"""Tokens of prompt and reply together that the base has positions for."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '" + END + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SLOT = "@@"


@lru_cache(maxsize=256)
def signature(instruction: str) -> type[dspy.Signature]:
    """The one signature of the lab, numbers -> answer, under an instruction."""
    return dspy.Signature("numbers: str -> answer: str", instruction)


def messages(instruction: str, numbers: str) -> list[dict[str, str]]:
    """The prompt exactly as DSPy sends it: system and user message."""
    return dspy.ChatAdapter().format(signature(instruction), demos=[], inputs={"numbers": numbers})


@lru_cache(maxsize=1)
def _user_pieces() -> tuple[str, str]:
    before, after = messages(_SLOT, _SLOT)[1]["content"].split(_SLOT)
    return before, after


def user_message(numbers: str) -> dict[str, str]:
    """The user message of `messages`, without rendering it anew: pretraining makes a hundred thousand of them."""
    before, after = _user_pieces()
    return {"role": "user", "content": before + numbers + after}


def reply(answer: str) -> str:
    """The completion that ChatAdapter parses back into `answer`."""
    return f"[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"


def fixed_pieces() -> list[str]:
    """The parts of prompt and reply that never change, longest possible, rendered by the adapter itself.

    The system piece gives its last space to the instruction, whose first word then looks like any other.
    """
    system, user = (message["content"] for message in messages(_SLOT, _SLOT))
    return [system.split(_SLOT)[0][:-1], *user.split(_SLOT), *reply(_SLOT).split(_SLOT), "\n        "]


def train_tokenizer(
    texts: Iterable[str], pieces: Sequence[str] | None = None, vocabulary: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """Train on instructions and lists and wrap for transformers and vLLM.

    Args:
        pieces: Fixed pieces of prompts, which need no training; by default `fixed_pieces`.
        vocabulary: Upper bound, the pieces not counted.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]|\s"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, END, *ROLES],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces or fixed_pieces()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
