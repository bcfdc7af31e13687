"""Measure a base model by sampling at temperature 1: `python -m programs.lab.measure [--model DIR]`.

Prints what `recipe.json` and the README's table hold: accuracy told and untold, the parse rate, the prompt lengths.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import dspy
import torch
from dspy.utils.exceptions import AdapterParseError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dspy_fst.engine.chat import rendered_ids
from programs.lab.operations import OPERATIONS, apply, say
from programs.lab.program import BASE
from programs.lab.tokenizer import messages, reply, signature
from programs.lab.world import World, draw_digits, load_world, world_names

REPLY_TOKENS = 16


def load(folder: Path = BASE) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A base model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model.eval(), tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[list[dict[str, str]]],
    seed: int = 0,
    reply_tokens: int = REPLY_TOKENS,
) -> list[str]:
    """One reply at temperature 1 for each chat, as text."""
    torch.manual_seed(seed)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    generate = cast(Callable[..., torch.Tensor], model.generate)  # of a mixin, which PreTrainedModel does not name
    ids = generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=reply_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def parse(text: str) -> str | None:
    """The answer in a reply as ChatAdapter reads it, or None if it can't."""
    try:
        return str(dspy.ChatAdapter().parse(signature(""), text)["answer"])
    except AdapterParseError:
        return None


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: list[tuple[str, str, str]],
    seed: int = 0,
) -> tuple[float, float]:
    """(share right, share parsed) over (instruction, numbers, answer) tasks."""
    answers = [parse(text) for text in sample(model, tokenizer, [messages(*task[:2]) for task in tasks], seed)]
    right = sum(got == task[2] for got, task in zip(answers, tasks, strict=True))
    return right / len(tasks), sum(got is not None for got in answers) / len(tasks)


def operation_tasks(rng: random.Random, name: str, wording: str, count: int) -> list[tuple[str, str, str]]:
    """Problems of one operation under an instruction that states it in one wording."""
    lists = [draw_digits(rng) for _ in range(count)]
    return [
        (say((wording,), rng), text, " ".join(map(str, apply((name,), [int(d) for d in text.split()]))))
        for text in lists
    ]


def world_tasks(rng: random.Random, world: World, instruction: str, count: int) -> list[tuple[str, str, str]]:
    """Problems of a world under any instruction."""
    return [(instruction, text, world.answer(text)) for text in (world.draw(rng) for _ in range(count))]


@dataclass(frozen=True)
class Report:
    """What a base model can do; shares in 0..1, rounded to three digits."""

    operations: dict[str, float]
    """Operation -> accuracy when told, over its pretraining wordings."""
    unheard: float
    """Mean accuracy of the operations told in the wording that pretraining left out."""
    told: dict[str, float]
    """World -> accuracy under the instruction that states its rule."""
    seed: dict[str, float]
    """World -> accuracy under its seed instruction."""
    parsed: float
    """Share of all replies that ChatAdapter can parse."""
    prompt_tokens: tuple[int, int]
    """Shortest and longest prompt of the above, chat template included."""
    reply_tokens: int
    """Tokens of a five-number reply, end of turn included."""


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    samples: int = 256,
    seed: int = 1,
    names: Sequence[str] | None = None,
) -> Report:
    """Sample `samples` replies for each operation and for each world under each of its two instructions.

    `names`: of the worlds, also import paths; None takes those that ship with the lab.
    """
    worlds = [load_world(name) for name in names or world_names()]
    rng = random.Random(f"measure-{seed}")
    parsed: list[float] = []
    lengths: list[int] = []

    def score(tasks: list[tuple[str, str, str]]) -> float:
        right, read = accuracy(model, tokenizer, tasks, seed)
        parsed.append(read)
        for instruction, numbers, _ in tasks[:8]:
            lengths.append(len(rendered_ids(tokenizer, messages(instruction, numbers), add_generation_prompt=True)))
        return round(right, 3)

    operations, unheard = {}, []
    for op in OPERATIONS:
        tasks = [operation_tasks(rng, op.name, wording, samples // len(op.wordings)) for wording in op.wordings]
        operations[op.name] = score([task for wording_tasks in tasks for task in wording_tasks])
        unheard.append(score(operation_tasks(rng, op.name, op.unheard, samples // 4)))
    return Report(
        operations=operations,
        unheard=round(sum(unheard) / len(unheard), 3),
        told={world.name: score(world_tasks(rng, world, world.told, samples)) for world in worlds},
        seed={world.name: score(world_tasks(rng, world, world.seed_instruction, samples)) for world in worlds},
        parsed=round(sum(parsed) / len(parsed), 3),
        prompt_tokens=(min(lengths), max(lengths)),
        reply_tokens=len(tokenizer(reply("1 2 3 4 5"))["input_ids"]) + 1,
    )


def table(report: Report) -> str:
    """The report as the README's markdown tables."""
    lines = ["| world | seed instruction | told the rule |", "| --- | --- | --- |"]
    lines += [f"| {name} | {report.seed[name]:.2f} | {report.told[name]:.2f} |" for name in report.told]
    lines += ["", "| operation | told |", "| --- | --- |"]
    lines += [f"| {name} | {share:.2f} |" for name, share in report.operations.items()]
    mean = sum(report.operations.values()) / len(report.operations)
    lines += [
        f"| mean | {mean:.2f} |",
        f"| mean, wording left out of pretraining | {report.unheard:.2f} |",
        "",
    ]
    low, high = report.prompt_tokens
    return "\n".join(
        [
            *lines,
            f"Replies that parse: {report.parsed:.3f}. Prompts {low}-{high} tokens, replies {report.reply_tokens}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BASE, help="folder of the model (default: the shipped base)")
    parser.add_argument("--world", action="append", help="a name or import path (default: all that ship with the lab)")
    parser.add_argument("--samples", type=int, default=256, help="replies a cell of the table")
    parser.add_argument("--json", action="store_true", help="print the raw report instead of tables")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model}: no model lies there")
    report = measure(*load(options.model), samples=options.samples, names=options.world)
    print(asdict(report) if options.json else table(report))


if __name__ == "__main__":
    main()
