"""Small calls, rollouts and groups, and a random Qwen3 of 64 words."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.types import Batch, Call, Candidate, Group, Rollout, Row

VOCABULARY = 64
SEED_TEXT = Candidate({"answer": "Answer."})


def make_call(
    completion: Sequence[int] = (5, 6),
    prompt: Sequence[int] = (1, 2, 3),
    *,
    predictor: str = "answer",
    weights: str = "step-000000",
    logprobs: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> Call:
    logprobs = [-1.0] * len(completion) if logprobs is None else logprobs
    return Call(predictor, tuple(prompt), tuple(completion), tuple(logprobs), "stop", weights, temperature)


def make_rollout(
    reward: float | None,
    *calls: Call,
    problem: int = 0,
    mask: str | None = None,
    failure: str | None = None,
) -> Rollout:
    return Rollout(problem, SEED_TEXT, calls, reward, Outcome.of_fields({"mask": mask, "failure": failure}))


def make_group(*rewards: float | None, problem: int = 0, tokens: int = 2) -> Group:
    """One call of ``tokens`` tokens a rollout; None is a masked rollout."""
    call = make_call([7] * tokens)
    rollouts = [
        make_rollout(reward, call, problem=problem, mask="timeout" if reward is None else None) for reward in rewards
    ]
    return Group(problem, tuple(rollouts))


def make_row(
    prompt: Sequence[int],
    completion: Sequence[int],
    logprobs: Sequence[float],
    advantage: float,
    weight: float,
    problem: int = 0,
    temperature: float = 1.0,
) -> Row:
    tokens = (tuple(prompt), tuple(completion), tuple(logprobs))
    return Row(*tokens, advantage, weight, temperature, "answer", problem)


def make_batch(rows: Sequence[Row]) -> Batch:
    return Batch(tuple(rows), "step-000000", Counter())


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<end>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def save_model(path: Path, *, tied: bool = False, seed: int = 0, width: int = 32) -> Path:
    """A Hugging Face folder of a random model, its weights wide enough that replies are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=VOCABULARY - 2,
        pad_token_id=VOCABULARY - 1,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
