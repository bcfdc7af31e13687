"""Make the base model from nothing: `python -m programs.lab.pretrain --out DIR [--seed N]`, minutes on one core.

Trains the tokenizer, then a Qwen3 of a million parameters on `lessons`, until its *measured* accuracy on told single
operations reaches a target (the useful window is short: soon after, it does everything it is told). Writes the model,
the tokenizer and `recipe.json`. One torch thread, so that a seed gives the same weights on the same machine.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from programs.lab.lessons import Dialogues, Lesson, draw_lesson, tokenizer_texts
from programs.lab.measure import Report, accuracy, measure, operation_tasks
from programs.lab.operations import OPERATIONS
from programs.lab.tokenizer import CONTEXT, END, messages, reply, train_tokenizer, user_message

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How a base is made."""

    seed: int = 0
    target: float = 0.6
    """Stop once told single operations reach this accuracy."""
    max_steps: int = 1000
    """Length of the cosine schedule, and the end if the target is never reached."""
    check_every: int = 25
    """Steps between measurements."""
    check_samples: int = 16
    """Replies an operation per measurement."""
    lessons: int = 12
    """Instructions per step."""
    problems: int = 4
    """Problems per instruction; they share its prompt."""
    learning_rate: float = 4e-3
    """AdamW's, for embeddings, head and norms."""
    muon_learning_rate: float = 3e-2
    """Muon's, for the layers' matrices: it needs half of AdamW's steps here."""
    warm_up: int = 20
    clip: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Lessons packed for one forward: L rows of T tokens, each a system prompt followed by its problems."""

    ids: torch.Tensor
    """(L, T) token ids."""
    positions: torch.Tensor
    """(L, T): every problem starts where the system prompt ends, as if it were alone."""
    mask: torch.Tensor
    """(L, 1, T, T) bool: a token sees the system prompt and its own problem, causally."""
    targets: torch.Tensor
    """(L, T): the next token where that is a reply's token, else IGNORED."""


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A million parameters, drawn from torch's generator. Untied: engines may keep a packed copy of a tied head."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    table = model.model.embed_tokens.weight.data
    for digit in "0123456789":  # a digit with and without a space before it starts out as the same thing
        bare, spaced = (tokenizer(text)["input_ids"] for text in (digit, f" {digit}"))
        table[spaced] = table[bare]
    return model


def dialogues(lesson: Lesson) -> Dialogues:
    """The lesson as DSPy would send it."""
    pairs = zip(lesson.problems, lesson.answers, strict=True)
    return Dialogues(
        messages(lesson.instruction, "")[0], tuple((user_message(numbers), reply(answer)) for numbers, answer in pairs)
    )


def pack(lessons: Sequence[Dialogues], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Lay out each lesson as one row, so that its system prompt is computed once for all its problems."""
    rows = [_row(lesson, tokenizer) for lesson in lessons]
    longest = max(len(row) for row in rows)
    padding = (tokenizer.pad_token_id, 0, -1, IGNORED)
    columns = torch.tensor([row + [padding] * (longest - len(row)) for row in rows]).permute(2, 0, 1)
    ids, positions, part, targets = columns
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    return Batch(ids, positions, (same & causal)[:, None], targets)


def _row(lesson: Dialogues, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int, int, int]]:
    """(id, position, part, target) of each token; part 0 is the system prompt, part k the k-th exchange."""
    head = tokenizer(tokenizer.apply_chat_template([lesson.system], tokenize=False))["input_ids"]
    row = [(token, place, 0, IGNORED) for place, token in enumerate(head)]
    for part, (user, answer) in enumerate(lesson.exchanges, start=1):
        question = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        ask, say = tokenizer([question, answer + END])["input_ids"]
        tokens = ask + say[:-1]
        targets = [IGNORED] * (len(ask) - 1) + say
        row += [(tokens[i], len(head) + i, part, targets[i]) for i in range(len(tokens))]
    return row


class Optimizers:
    """Muon for the layers' matrices, AdamW for all else, under one cosine schedule with warm-up."""

    def __init__(self, model: Qwen3ForCausalLM, recipe: Recipe) -> None:
        matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
        taken = {id(weight) for weight in matrices}
        rest = [weight for weight in model.parameters() if id(weight) not in taken]
        self.all = [
            torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

        def factor(step: int) -> float:
            return min((step + 1) / recipe.warm_up, 1.0) * (1 + math.cos(math.pi * step / recipe.max_steps)) / 2

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self.all]

    def step(self) -> None:
        """Apply the gradients, forget them, and move the schedule on."""
        for optimizer, schedule in zip(self.all, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def train_step(model: Qwen3ForCausalLM, optimizers: Optimizers, batch: Batch, clip: float) -> float:
    """One step on the replies' cross-entropy; the head sees only the positions that count."""
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    counted = batch.targets != IGNORED
    loss = F.cross_entropy(model.lm_head(hidden[counted]), batch.targets[counted])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizers.step()
    return float(loss.detach())


def told_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: int, seed: int) -> float:
    """Accuracy over all single operations, each told in its most frequent wording."""
    rng = random.Random(f"check-{seed}")
    tasks = [task for op in OPERATIONS for task in operation_tasks(rng, op.name, op.wordings[0], samples)]
    with torch.random.fork_rng():
        return accuracy(model.eval(), tokenizer, tasks)[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a model is slower on several threads, and its sums differ with their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    draw: Callable[[], Dialogues],
    told_after: Callable[[int], float],
) -> dict[str, int]:
    """Train on drawn lessons until what the model does as told, measured after a step, reaches the target.

    Returns what it took: steps, tokens, parameters, seconds.
    """
    began = time.monotonic()
    optimizers = Optimizers(model, recipe)
    tokens, told, step = 0, 0.0, 0
    while told < recipe.target and step < recipe.max_steps:
        batch = pack([draw() for _ in range(recipe.lessons)], tokenizer)
        loss = train_step(model.train(), optimizers, batch, recipe.clip)
        step, tokens = step + 1, tokens + batch.ids.numel()
        if step % recipe.check_every == 0:
            told = told_after(step)
            print(
                f"step {step:4d}  {time.monotonic() - began:4.0f} s  loss {loss:.3f}  told {told:.3f}",
                flush=True,
            )
    if told < recipe.target:
        print(f"stopped after {step} steps at {told:.3f}, before the target of {recipe.target}", flush=True)
    seconds = round(time.monotonic() - began)
    return {"steps": step, "tokens": tokens, "parameters": model.num_parameters(), "seconds": seconds}


@one_thread()
def pretrain(recipe: Recipe, out: Path) -> Report:
    """Run a recipe, save everything to `out` and return what the model can do."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"pretrain-{recipe.seed}")
    tokenizer = train_tokenizer(tokenizer_texts())
    model = new_model(tokenizer)
    made = fit(
        model,
        tokenizer,
        recipe,
        lambda: dialogues(draw_lesson(rng, recipe.problems)),
        lambda step: told_accuracy(model, tokenizer, recipe.check_samples, step),
    )
    report = measure(model.eval(), tokenizer)
    save(out, model, tokenizer, {"recipe": asdict(recipe), "made": made, "measured": asdict(report)})
    return report


def save(out: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: dict[str, Any]) -> None:
    """Write the model, its tokenizer and ``recipe.json``: how they were made and what they can do."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    text = json.dumps(recipe, indent=2)
    (out / "recipe.json").write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--target", type=float, default=Recipe.target, help="told accuracy at which to stop")
    parser.add_argument("--max-steps", type=int, default=Recipe.max_steps)
    options = parser.parse_args()
    pretrain(Recipe(seed=options.seed, target=options.target, max_steps=options.max_steps), options.out)


if __name__ == "__main__":
    main()
