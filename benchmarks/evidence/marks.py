"""What a run was made of, in a few characters, so that an old result is not taken for that of a changed world or base.

Trying a world also finds what is wrong with it before any process starts.
"""

import hashlib
import json
import random
from functools import cache
from pathlib import Path

from dspy_fst.model_files.lora_folder import model_files_in
from dspy_fst.run.files import sha256_of
from programs.lab.world import World, load_world

PROBLEMS = 20


@cache
def world_mark(name: str) -> str:
    """Of what a world asks, answers and says on a few problems.

    Raises:
        ValueError: it cannot be found, or its parts do not give text.
    """
    try:
        return _digest(json.dumps(_tried(load_world(name))).encode())
    except Exception as fault:  # a world is anybody's code
        raise ValueError(f"world {name!r}: {type(fault).__name__}: {fault}") from fault


@cache
def base_mark(folder: Path) -> str:
    """Of a model's weights, its LoRA adapters and their base included.

    Raises:
        ValueError: the folder holds none.
    """
    places = model_files_in(folder)
    files = [file for place in places for file in sorted(place.glob("*.safetensors"))]
    if not files or not (places[0] / "config.json").is_file():
        raise ValueError(f"base {str(folder)!r}: no model lies there (config.json and *.safetensors)")
    return _digest(b"".join(bytes.fromhex(sha256_of(file)) for file in files))


def _tried(world: World) -> list[str]:
    draws = random.Random("a world is tried")
    problems = [world.draw(draws) for _ in range(PROBLEMS)]
    answers = [_text(world.answer(problem)) for problem in problems]
    pairs = [(answer, got) for answer in answers for got in (answer, "0")]
    said = [world.feedback(*pair, shows_answer) for pair in pairs for shows_answer in (True, False)]
    _text(world.told)  # no run reads it, so it is no part of the mark
    return [_text(part) for part in (world.seed_instruction, *problems, *answers, *said)]


def _text(part: object) -> str:
    if not isinstance(part, str):
        raise TypeError(f"problems, answers, feedback and instructions are texts, not {type(part).__name__}")
    return part


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
