"""A tiny task for optimizers in GEPA's place, and an LM that writes the texts which they ask for."""

import itertools
import json
import re

import dspy

from dspy_fst.engine.chat import chat_messages, text_response
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.fast.seated_search import searcher
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.types import Population, Problem
from tests.fakes import fields, scripted_policy

ANCHORS = [Problem(i, dspy.Example(question=str(i), answer="yes").with_inputs("question")) for i in range(12)]
SKILLS = ("even", "odd")
THREADS = 4


DEMOS = {"max_bootstrapped_demos": 2, "max_labeled_demos": 1}
"""Of a run whose candidates hold demos."""


class Asks(dspy.Module):
    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict(dspy.Signature("question -> answer", "Answer."))

    def forward(self, question):
        return self.answer(question=question)


def speak(messages, seed):
    """Right where the instruction names the question's parity, else once in four times."""
    shown = messages[-1]["content"].rsplit("## question ## ]]\n", 1)[1]
    skilled = SKILLS[int(shown.split("\n")[0]) % 2] in messages[0]["content"]
    return fields(answer="yes" if skilled or seed % 4 == 0 else "no")


def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
    right = pred.answer == gold.answer
    return dspy.Prediction(score=float(right), feedback="right" if right else f"{gold.question} is wrong")


class Writer:
    """An engine that fills every output field that the prompt asks for, with one skill after the other."""

    def __init__(self):
        self.turn = itertools.count()
        self.asked = 0

    def complete(self, request):
        self.asked += 1
        text = chat_messages(request)
        system, skill = text[0]["content"], SKILLS[next(self.turn) % 2]
        if "{" in system.split("All interactions")[0] and '"new_instruction"' in system:
            return self._said(request, json.dumps({"new_instruction": skill}))
        outputs = system.split("Your output fields are:")[1].split("All interactions")[0]
        names = re.findall(r"^\d+\. `(\w+)`", outputs, re.M)
        values = dict.fromkeys(names, f"Mind the {skill} ones.")
        if "module_advice" in values:
            values["module_advice"] = json.dumps({"answer": f"Mind the {skill} ones."})
        return self._said(request, fields(**values))

    def _said(self, request, text):
        return text_response(request.model, text, "stop", 10, 5)


def writer():
    """A reflection LM, and its engine."""
    engine = Writer()
    return dspy.LM("writer", engine=engine, cache=False, max_tokens=2000), engine


class Seated:
    """Plays, counts, and searches with what is put into the seat."""

    def __init__(self, program=None, speak=speak, metric=metric):
        self.program = program or Asks()
        policy, self.engine = scripted_policy(speak)
        self.engine.version = "step-000000"
        self.program.set_lm(policy)
        self.rollouter = Rollouter(self.program, Reward(metric), RolloutSettings(num_threads=THREADS))
        self.batches: list[list[tuple]] = []
        self.lm, self.writer = writer()

    @property
    def made(self):
        """(candidate, problem, number) of every rollout."""
        return [(task.candidate.digest, task.problem.index, task.sample) for batch in self.batches for task in batch]

    def play(self, wanted):
        self.batches.append(list(wanted))
        return self.rollouter.rollout(wanted, "search-0")

    def search(self, fast, population=None, journal=None, size=2, budget=200, seed=3, anchors=ANCHORS, **given):
        of_gepa = {name: given.pop(name) for name in ("options", "propose", "feedback") if name in given}
        demos = given.pop("demos", False)
        population = population or Population.of_seed(read_texts(self.program, demos=demos), 2)
        return searcher(fast, THREADS)(
            population,
            anchors,
            self.program,
            play=self.play,
            settings=SearchSettings(**(DEMOS if demos else {}), **given),
            size=size,
            budget=budget,
            seed=seed,
            reflection_lm=self.lm,
            journal=journal,
            **of_gepa,
        )
