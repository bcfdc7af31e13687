"""An LM for the prompts of DSPy's own optimizers (COPRO, MIPROv2, SIMBA), for runs that must be free and repeatable.

It is what `FeedbackProposer` is to GEPA, with the same limits: it answers from what the prompt shows, and never sees a
world, its rule or its told instruction. Where the prompt shows problems with their answers (MIPROv2's examples, SIMBA's
labels) it reads two of them, draws one of the shortest everyday rules that fit, and states it in one of several
wordings. Where the prompt shows none (COPRO) it guesses a rule, and keeps what is said to have scored best.
"""

import hashlib
import json
import random
import re
from collections import Counter

import dspy
from dspy import lm15

from dspy_fst.engine.chat import chat_messages, text_response
from programs.lab.operations import OPENERS, chains
from programs.lab.proposer import guess_rule, in_words, states_rule

READS = 2
"""Problems with answers that it reads of a prompt, as `FeedbackProposer` does."""
KEEPS = 0.5
"""Chance that it builds on the instruction that scored best so far, where the prompt shows any."""
_PAIR = re.compile(r"numbers\W+((?:\d ){2,}\d).{1,80}?answer\W+((?:\d ?)+)", re.S | re.I)
_LABELLED = re.compile(
    r"## program_inputs ##.*?numbers\W+((?:\d ){2,}\d).*?## oracle_metadata ##.*?answer\W+((?:\d ?)+)", re.S
)
_ATTEMPT = re.compile(r"Instruction #\d+: ([^»\n]*).*?Prefix #\d+.*?Resulting Score #\d+: ([\d.]+)", re.S)


def prompt_lm(seed: int = 0) -> dspy.LM:
    """The LM, for ``FSTOptimizer(reflection_lm=...)`` in the laboratory."""
    return dspy.LM("laboratory", engine=PromptReader(seed), cache=False, max_tokens=1000)


class PromptReader:
    """DSPy's engine behind `prompt_lm`. The same prompt asked again gets another draw."""

    def __init__(self, seed: int):
        self._seed = seed
        self._asked: Counter[str] = Counter()

    def complete(self, request: lm15.Request) -> lm15.Response:
        messages = chat_messages(request)
        system, shown = str(messages[0]["content"]), str(messages[-1]["content"])
        key = hashlib.sha256(f"{self._seed} {system} {shown}".encode()).hexdigest()
        self._asked[key] += 1
        said = instruction_from(shown, random.Random(f"{key} {self._asked[key]}"))
        text = _reply(system, shown, said)
        return text_response(request.model, text, "stop", len(system + shown) // 4, len(text) // 4)

    def __deepcopy__(self, memo: dict[int, object]) -> "PromptReader":
        return self


def instruction_from(shown: str, rng: random.Random) -> str:
    """What it would tell the policy, after it has read a prompt.

    >>> text = "[{'numbers': '1 2 3', 'answer': '3 2 1'}, {'numbers': '4 7 5', 'answer': '5 7 4'}]"
    >>> states_rule(instruction_from(text, random.Random(0)))
    True
    """
    pairs = _LABELLED.findall(shown) or _PAIR.findall(shown)
    records = [{"Feedback": f"Expected: {right.strip()}.", "Inputs": {"numbers": numbers}} for numbers, right in pairs]
    rule = guess_rule(rng.sample(records, min(READS, len(records))), rng)
    if rule is None and (known := [s for s in re.split(r"(?<=\.)\s+", shown) if states_rule(s) and len(s) < 200]):
        return rng.choice(known).strip().splitlines()[-1]
    if not pairs and (attempts := _ATTEMPT.findall(shown)) and rng.random() < KEEPS:
        best = max(attempts, key=lambda attempt: float(attempt[1]))[0]
        return f"{rng.choice(OPENERS)} {best}"
    return in_words(rng.choice([*chains()]) if rule is None else rule, rng)


def _reply(system: str, shown: str, said: str) -> str:
    """Every output field that the prompt asks for, as dspy.ChatAdapter reads them."""
    outputs = system.split("Your output fields are:")[1].split("All interactions")[0]
    values = dict.fromkeys(re.findall(r"^\d+\. `(\w+)`", outputs, re.M), said)
    if "module_advice" in values:
        names = re.search(r"## module_names ## \]\]\s*(\[.*?\])", shown, re.S)
        values["module_advice"] = json.dumps(dict.fromkeys(json.loads(names[1]) if names else [], said))
    return "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in values.items()) + "\n\n[[ ## completed ## ]]"
