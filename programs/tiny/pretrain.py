"""Make a base model: `python -m programs.tiny.pretrain {reckon,paper} --out DIR [--seed N]`, minutes on one core.

The laboratory's pretraining with other lessons. It stops when the model does what it is told well enough, on average
over the predictors.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from programs.hover.world import spelled
from programs.lab.measure import sample
from programs.lab.pretrain import Recipe, fit, new_model, one_thread, save
from programs.lab.tokenizer import train_tokenizer
from programs.tiny.courses import COURSES
from programs.tiny.skills import OPENERS, REASONING, REMARKS, Course, ask

RECIPES = {
    "reckon": Recipe(target=0.6, max_steps=800, check_every=50, check_samples=12, lessons=8),
    "paper": Recipe(target=0.6, max_steps=800, check_every=100, check_samples=24, lessons=8),
}
VOCABULARY = 2048
"""Upper bound; the shipped tokenizer needs fewer."""
REPLY_TOKENS = 64


@dataclass(frozen=True)
class Report:
    """What a base can do; shares in 0..1 at temperature 1."""

    told: dict[str, float]
    """Predictor and skill, e.g. "hover.judge compared" -> how often it is done when asked for."""
    untold: dict[str, float]
    """The same under instructions that ask for nothing."""
    parsed: float
    """Share of all replies that ChatAdapter can parse."""


def tokenizer_texts(taught: Sequence[Course], count: int = 6000) -> Iterator[str]:
    """Text to train the tokenizer on: lessons without their fixed pieces, and every wording there is."""
    rng = random.Random("tokenizer")
    for _ in range(count):
        course = rng.choice(taught)
        inputs, skill = course.draw(rng), rng.choice(course.skills)
        yield f" {ask(skill, rng)}"
        # In syllables, of which there are few: names would each be a word that is hardly ever met.
        yield from (spelled(str(inputs[name])) for name in course.signature.input_fields)
        yield spelled(skill.act(inputs))
    for course in taught:
        wordings = [f"{text}." for skill in course.skills for text in skill.wordings]
        fixed = (*OPENERS, *REMARKS, REASONING, course.signature.instructions)
        yield from [f" {text}" for text in (*fixed, *wordings)] * 20


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, taught: Sequence[Course], samples: int, seed: int
) -> Report:
    """Ask for every skill, and for none, `samples` times each."""
    rng = random.Random(f"measure-{seed}")
    told: dict[str, float] = {}
    untold: dict[str, float] = {}
    parsed = []
    for course in taught:
        for skill in course.skills:
            for share, instructions in (
                (told, [ask(skill, rng) for _ in range(samples)]),
                (untold, [course.generic(rng) for _ in range(samples)]),
            ):
                drawn = [course.draw(rng) for _ in range(samples)]
                chats = [course.chat(text, inputs) for text, inputs in zip(instructions, drawn, strict=True)]
                texts = sample(model, tokenizer, chats, rng.randrange(2**31), REPLY_TOKENS)
                said = [course.read(text) for text in texts]
                parsed += [text is not None for text in said]
                right = [text == skill.act(given).lower() for text, given in zip(said, drawn, strict=True)]
                share[f"{course.name} {skill.name}"] = round(sum(right) / samples, 3)
    return Report(told, untold, round(sum(parsed) / len(parsed), 3))


def told_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, taught: Sequence[Course], samples: int, seed: int
) -> float:
    """Mean over the predictors of how often they do what they are told."""
    rng = random.Random(f"check-{seed}")
    shares = []
    for course in taught:
        asked = [(skill, course.draw(rng)) for skill in course.skills for _ in range(samples)]
        chats = [course.chat(ask(skill, rng), inputs) for skill, inputs in asked]
        with torch.random.fork_rng():
            texts = sample(model.eval(), tokenizer, chats, seed, REPLY_TOKENS)
        right = [
            course.read(text) == skill.act(given).lower() for text, (skill, given) in zip(texts, asked, strict=True)
        ]
        shares.append(sum(right) / len(right))
    print("  ".join(f"{course.name} {share:.2f}" for course, share in zip(taught, shares, strict=True)), flush=True)
    return sum(shares) / len(shares)


@torch.no_grad()
def start_alike(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A word starts out as the same thing with and without a space before it, read or written: most skills copy."""
    table, words = model.model.embed_tokens.weight, tokenizer.get_vocab()
    for word, number in words.items():
        if word.startswith("Ġ") and word[1:] in words:
            table[number] = table[words[word[1:]]]
    model.lm_head.weight.copy_(table)


def make_tokenizer(taught: Sequence[Course]) -> PreTrainedTokenizerFast:
    """Words, digits, and each fixed piece of the programs' prompts as one token."""
    pieces = sorted(
        {piece for course in taught for piece in course.pieces() if piece}, key=lambda piece: (-len(piece), piece)
    )
    return train_tokenizer(tokenizer_texts(taught), pieces, VOCABULARY)


@one_thread()
def pretrain(base: str, recipe: Recipe, out: Path) -> Report:
    """Run a recipe on the lessons of a base, save everything to `out` and return what the model can do."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"pretrain-{recipe.seed}")
    taught = COURSES[base]()
    tokenizer = make_tokenizer(taught)
    model = new_model(tokenizer)
    start_alike(model, tokenizer)
    shares = [course.share for course in taught]
    made = fit(
        model,
        tokenizer,
        recipe,
        lambda: rng.choices(taught, shares)[0].lesson(rng),
        lambda step: told_accuracy(model, tokenizer, taught, recipe.check_samples, step),
    )
    report = measure(model.eval(), tokenizer, taught, samples=128, seed=1)
    save(out, model, tokenizer, {"recipe": asdict(recipe), "made": made, "measured": asdict(report)})
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pretrain(options.base, replace(RECIPES[options.base], seed=options.seed), options.out)


if __name__ == "__main__":
    main()
