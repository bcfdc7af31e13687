"""The small bases: their lessons and tokenizers, what they do, and that their script makes them."""

import json
import os
import random
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from programs.lab.measure import load
from programs.tiny import PAPER, RECKON
from programs.tiny.courses import COURSES
from programs.tiny.pretrain import RECIPES, make_tokenizer, measure, pretrain
from programs.tiny.skills import Course

BASES = {"paper": PAPER, "reckon": RECKON}


@cache
def taught(name: str) -> list[Course]:
    return COURSES[name]()


@cache
def base(name: str) -> tuple[Any, Any]:
    return load(BASES[name])


def recipe(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "recipe.json").read_text()))


@pytest.mark.parametrize("name", BASES)
def test_every_lesson_is_a_reply_that_the_program_can_read(name: str) -> None:
    rng = random.Random(0)
    for course in taught(name):
        for _ in range(20):
            lesson = course.lesson(rng)
            assert lesson.system["role"] == "system"
            assert all(user["role"] == "user" and course.read(reply) for user, reply in lesson.exchanges)
    assert sum(course.share for course in taught(name)) == pytest.approx(1.0)


def test_a_lesson_asks_for_what_it_teaches_or_for_nothing() -> None:
    rng = random.Random(1)
    plan = taught("reckon")[0]
    asked = 0
    for _ in range(200):
        lesson = plan.lesson(rng)
        words = lesson.system["content"].lower()
        named = [skill for skill in plan.skills if any(wording in words for wording in skill.wordings)]
        for user, reply in lesson.exchanges:
            numbers = user["content"].split("]]\n")[1].split("\n")[0]
            assert plan.read(reply) in [skill.act({"numbers": numbers}) for skill in named or plan.skills]
        asked += bool(named)
    assert 0.65 < asked / 200 < 0.85


@pytest.mark.parametrize("name", BASES)
def test_the_shipped_tokenizer_is_the_script_s_and_each_fixed_piece_is_one_token(name: str, tmp_path: Path) -> None:
    make_tokenizer(taught(name)).save_pretrained(tmp_path)
    made, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, BASES[name]))
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        assert made[part] == shipped[part]
    # The shipped ones were made when pieces of one length had no order yet.
    assert {token["content"] for token in made["added_tokens"]} == {
        token["content"] for token in shipped["added_tokens"]
    }
    for course in taught(name):
        assert all(len(base(name)[1](piece)["input_ids"]) == 1 for piece in course.pieces() if piece)


@pytest.mark.parametrize("name", BASES)
def test_a_shipped_base_does_as_its_recipe_says(name: str) -> None:
    found = measure(*base(name), taught(name), samples=24, seed=7)
    said = recipe(BASES[name])["measured"]
    assert fmean(found.told.values()) == pytest.approx(fmean(said["told"].values()), abs=0.1)
    assert fmean(found.untold.values()) == pytest.approx(fmean(said["untold"].values()), abs=0.1)
    assert found.parsed >= 0.9


def test_words_steer_the_base_of_reckon() -> None:
    said = recipe(RECKON)["measured"]
    assert fmean(said["told"].values()) > fmean(said["untold"].values()) + 0.2


@pytest.mark.parametrize("name", BASES)
def test_a_shipped_base_is_small_and_untied(name: str) -> None:
    assert base(name)[0].config.tie_word_embeddings is False
    assert sum(file.stat().st_size for file in BASES[name].iterdir()) < 5e6


@pytest.mark.skipif("REMAKE_BASES" not in os.environ, reason="many minutes: REMAKE_BASES=1 pytest tests/programs")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", BASES)
def test_the_pretraining_script_remakes_a_shipped_base(name: str, tmp_path: Path) -> None:
    report = pretrain(name, RECIPES[name], tmp_path)
    made, shipped = recipe(tmp_path), recipe(BASES[name])
    assert made["recipe"] == shipped["recipe"]
    assert made["made"]["parameters"] == shipped["made"]["parameters"]
    assert report.parsed >= 0.9
    assert fmean(report.told.values()) == pytest.approx(fmean(shipped["measured"]["told"].values()), abs=0.2)
