"""How many turns of a real model's conversations go on from the ids that were sampled, and how many would if rendered.

    python -m benchmarks.turns --out benchmarks/results/turns.json

SmolLM2-135M-Instruct in process; each conversation asks it several times and puts each reply back as a message.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dspy
from dspy import lm15

from dspy_fst import PolicyLM
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.slow.batching import Scored, chains
from dspy_fst.types import Problem, Rollout
from programs import smollm2

QUESTIONS = (
    "Name three rivers and where they end.",
    "Why is the sky blue in the morning?",
    "Write a line about a lighthouse.",
    "Which fruit would you take on a walk?",
)
NEXT = ("Say it in other words.", "Give an example with a number.", "Now in one word.")


class Conversation(dspy.Module):
    """One question and three more, each prompt holding all that was said."""

    def __init__(self, lm: PolicyLM):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
        self.ask.lm = lm

    def forward(self, question: str) -> dspy.Prediction:
        messages, lm = [lm15.Message.user(question)], self.ask.lm
        assert lm is not None
        for following in (*NEXT, ""):
            request = lm15.Request(lm.model, tuple(messages), config=lm15.Config(max_tokens=48, temperature=1.0))
            said = lm(request).text or ""
            messages += [lm15.Message.assistant(said or " "), lm15.Message.user(following or ".")]
        return dspy.Prediction(answer=said)


def played(policy: PolicyLM, samples: int) -> list[Rollout]:
    program = Conversation(policy)
    threads = samples * len(QUESTIONS)
    rollouter = Rollouter(
        program,
        Reward(lambda gold, pred, trace=None: 1.0),
        RolloutSettings(num_threads=threads, rollout_timeout_s=3600),
    )
    examples = [dspy.Example(question=question).with_inputs("question") for question in QUESTIONS]
    seed = read_texts(program)
    tasks = [Task(Problem(i, example), seed, n) for i, example in enumerate(examples) for n in range(samples)]
    policy.handle.engine.expect(threads)
    return rollouter.rollout(tasks, "turns")


def measured(rollouts: list[Rollout], tokenizer: Any) -> dict[str, Any]:
    """Counts of the turns after the first, of their replies, and of what a trainer reads a conversation as."""
    pairs = [pair for rollout in rollouts for pair in zip(rollout.calls, rollout.calls[1:], strict=False)]
    said = [before.completion_ids for before, _ in pairs]

    def respelt(ids: tuple[int, ...]) -> tuple[int, ...]:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    sequences = [
        len(chains([Scored((*c.prompt_ids, *c.completion_ids), len(c.prompt_ids)) for c in rollout.calls]))
        for rollout in rollouts
    ]
    return {
        "conversations": len(rollouts),
        "later_turns": len(pairs),
        "replies_whose_text_has_other_ids": sum(respelt(ids) != ids for ids in said),
        "turns_that_would_go_on_if_rendered": sum(respelt(ids) == ids for ids in said),
        "turns_that_go_on": sum(after.turn == "continued" for _, after in pairs),
        "turns_rendered_anew": sum(after.turn == "rerendered" for _, after in pairs),
        "sequences_for_the_trainer": sum(sequences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=6, help="conversations for each question")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    policy = PolicyLM(smollm2.folder(), engine="in_process", max_tokens=48)
    try:
        rollouts = played(policy, asked.samples)
        result = measured(rollouts, policy.handle.reader.tokenizer)
    finally:
        policy.release()
    machine = {"model": "SmolLM2-135M-Instruct, float32, CPU", "python": platform.python_version()}
    machine |= {name: version(name) for name in ("dspy", "transformers", "torch")}
    asked.out.write_text(json.dumps({**machine, **result}, indent=2) + "\n", encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
