"""The relay on the laboratory's base, each predictor through a LoRA adapter of its own with random numbers."""

import json
import shutil
from pathlib import Path

import dspy

from dspy_fst import PolicyLM
from dspy_fst.model_files.lora_folder import BESIDE, INDEX, INSIDE, index_of
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.rollout.components import read_texts, with_texts
from dspy_fst.types import Candidate, Population
from programs.lab import BASE
from tests.engine.test_lora_in_process import adapter
from tests.relay import Relay

OF = {"first": "for-first", "last": "for-last"}
"""Predictor -> its LoRA adapter."""


def version(weights: Path, name: str) -> Path:
    """Such a version's folder, as a run writes it."""
    shutil.copytree(BASE, weights / INSIDE)
    folder = weights / name
    for seed, adapter_name in enumerate(OF.values(), start=1):
        adapter(folder, adapter_name, seed, LoRA(rank=4))
    (folder / INDEX).write_text(json.dumps(index_of(BESIDE, list(OF.values()), OF)))
    return folder


def two_adapters(weights: Path, engine: str = "in_process", name: str = "step-000003") -> dspy.Module:
    """The compiled program, of two candidates. Greedy: a question has one answer."""
    program = Relay()
    options = {"linger_s": 0.0} if engine == "in_process" else {}
    weights = version(weights, name)
    policy = PolicyLM(weights, engine=engine, max_tokens=12, temperature=0.0, version=name, engine_options=options)
    for predictor_name, predictor in program.named_predictors():
        predictor.lm = policy.on(policy.handle, OF[predictor_name])
    names = read_texts(program).texts
    members = tuple(Candidate(dict.fromkeys(names, text)) for text in ("Reverse the list.", "Sort the list."))
    best = with_texts(program, members[0])
    best.population = Population(members, (0.4, 0.1))
    return best
