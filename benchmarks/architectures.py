"""Measures, family by family, whether training and sampling give what plain transformers gives: docs/architectures.md.

    python -m benchmarks.architectures            # the columns that need no server; a minute or two
    python -m benchmarks.architectures --vllm     # vLLM's column, one process for each family; some ten minutes

Each family is a tiny random model (see `benchmarks.families`). What is compared is what a user meets: the trainer's
scores and gradient, with prompts shared and not; recorded log-probabilities of replies sampled side by side; the
engine's scores after an update was published and loaded.
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from dspy import lm15
from torch import Tensor

from benchmarks.architectures_vllm import as_run, serve_all
from benchmarks.families import FAMILIES, Family
from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint, Completion
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.errors import FSTError
from dspy_fst.model_files.architectures import load_model
from dspy_fst.preflight.model_checks import model_faults
from dspy_fst.slow.batching import Scored, micro_batches
from dspy_fst.slow.losses import cispo
from dspy_fst.slow.losses.loss import Band, Tokens
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Call, Row

TEXTS = (
    Scored((2, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42), 6, 0.7),
    Scored((2, 30, 31, 32, 33, 34, 90, 91), 6),
    Scored((2, 30, 31, 32, 33, 34, 35, 36, 95, 12, 13, 14, 15, 16, 17, 18, 19), 6),
    Scored((7, 100, 101, 5, 9, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86), 12),
    Scored((9, 8, 7, 50, 51), 3),
)
"""Some begin alike, all of other lengths, some longer than the tiny windows."""
ADVANTAGES, BEHAVIOUR, CAP = (1.0, -0.5, 0.25, 2.0, -1.0), -3.0, 2.0
WORDS = ("1 2 3", "1 2 3", "4 5 6 7 8 9 1 2 3 4 5", "1 2 3", "9 8", "5 5 5 5 5 5 5")
"""What is sampled side by side: prompts alike, and of four lengths."""
LONGEST = 12
SETTINGS = TrainingSettings(learning_rate=1e-2, kl_coefficient=0.0, min_effective_share=0.0)
"""Nothing is refused: how far the engine and the trainer are apart is what is measured."""
EQUAL = 3e-4
"""Largest gap, in nats or relative, that is called equal: states that are kept round off further than texts read whole.

An engine that stayed behind is off by 0.05 and more (`Outcome.moved`)."""


@dataclass(frozen=True)
class Outcome:
    """What came out for a family: the largest gaps, or the sentence with which it is refused."""

    family: str
    model_type: str
    refused: str | None = None
    score: float = math.nan
    """Trainer against plain transformers: log-probabilities, in nats."""
    gradient: float = math.nan
    """Norm of the gradient's difference, prompts read one by one, relative to plain autograd's."""
    shared_gradient: float | None = None
    """The same with common prompts read once; None when this family does not share."""
    sampled: float = math.nan
    """Recorded log-probabilities of replies sampled side by side against plain transformers, in nats."""
    published: float = math.nan
    """Engine against trainer after an update was published and loaded, in nats."""
    slowly: bool = False
    """Whether the engine reads the whole text again for every token."""
    moved: float = math.nan
    """How far that update moved the scores, in nats: a stale engine would be off by as much."""


def measure(family: Family, folder: Path) -> Outcome:
    """Train and sample one family in this process.

    Raises:
        Exception: something failed in a way that no user should meet.
    """
    torch.manual_seed(0)
    base = family.save(folder / "base")
    try:
        faults = model_faults(PolicyLM(base, engine="in_process", max_tokens=LONGEST))
        if faults:
            return Outcome(family.name, family.model_type, refused=faults[0].partition(": ")[2])
        trainer = Trainer(base, SETTINGS, device="cpu")
    except FSTError as error:
        return Outcome(family.name, family.model_type, refused=str(error))
    plain = load_model(base, dtype=torch.float32).eval()
    whole = [Scored(text.ids, 1) for text in TEXTS]
    before = trainer.score([text.ids for text in TEXTS])
    score = _gap(before, _plain_scores(plain, whole))
    gradient, shared = _gradients(base, plain)
    with InProcess(base) as engine:
        sampled = engine.sample(WORDS)
        own = _plain_scores(plain, [Scored((*c.prompt_ids, *c.completion_ids), len(c.prompt_ids)) for c in sampled])
        recorded = _gap([c.logprobs for c in sampled], own)
        trainer.step(_batch(sampled))
        engine.load(trainer.publish(folder / "published", "v1"))
        after = trainer.score([text.ids for text in TEXTS])
        again = engine.sample(WORDS)
        published = max(
            _gap(engine.engine.score([text.ids for text in TEXTS]), after),
            _gap([c.logprobs for c in again], trainer.logprobs([_call(c) for c in again])),
        )
        slowly = not engine.engine._decoder.keeps_cache
    moved = _gap(before, after)
    return Outcome(family.name, family.model_type, None, score, gradient, shared, recorded, published, slowly, moved)


class InProcess:
    """The embedded engine on a folder, asked from as many threads as there are prompts."""

    def __init__(self, folder: Path):
        self.engine = InProcessEngine(InProcessSettings(device="cpu", linger_s=5.0))
        self.engine.load(Checkpoint("base", folder))
        self.load = self.engine.load

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def sample(self, words: Sequence[str]) -> list[Completion]:
        self.engine.expect(len(words))
        with ThreadPoolExecutor(len(words)) as pool:
            return list(pool.map(self._ask, words, range(len(words))))

    def _ask(self, words: str, seed: int) -> Completion:
        config = lm15.Config(max_tokens=LONGEST - 2 * (seed % 3), temperature=1.0)
        request = lm15.Request(model="policy", messages=(lm15.Message.user(words),), config=config)
        return self.engine.complete(request, seed)


def _call(c: Completion) -> Call:
    return Call("answer", c.prompt_ids, c.completion_ids, c.logprobs, c.finish_reason, c.weights)


def _batch(completions: Sequence[Completion]) -> Batch:
    share = 1 / sum(len(completion.completion_ids) for completion in completions)
    rows = [
        Row(c.prompt_ids, c.completion_ids, c.logprobs, (-1.0) ** index, share) for index, c in enumerate(completions)
    ]
    return Batch(tuple(rows), "base")


def _plain_logprobs(model: Any, text: Scored) -> Tensor:
    """Of the scored tokens, by the model's own forward over this text alone; carries the gradient."""
    logits = model(torch.tensor([text.ids]), use_cache=False).logits[0].float()[text.start - 1 : -1] / text.temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(text.ids[text.start :])[:, None])[:, 0]


@torch.no_grad()
def _plain_scores(model: Any, texts: Sequence[Scored]) -> list[list[float]]:
    return [_plain_logprobs(model, text).tolist() for text in texts]


def _plain_gradient(model: Any) -> dict[str, Tensor]:
    """Of the CISPO loss over `TEXTS`, one after another, by plain autograd."""
    for text, advantage in zip(TEXTS, ADVANTAGES, strict=True):
        logprobs = _plain_logprobs(model, text)
        weight = (logprobs.detach() - BEHAVIOUR).exp().clamp(max=CAP)
        (-(weight * advantage * logprobs).sum() / sum(t.tokens for t in TEXTS)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _policy_gradient(policy: Policy, *, share: bool) -> dict[str, Tensor]:
    """Of the same loss through what the trainer computes with."""
    for micro in micro_batches(TEXTS, 40, share=share):
        log_probs = torch.log_softmax(policy.logits(micro) / micro.temperatures[:, None], dim=-1)
        chosen = log_probs.gather(-1, micro.targets[:, None])[:, 0]
        advantages = torch.tensor(
            [ADVANTAGES[m] for m, n in zip(micro.members, micro.tokens, strict=True) for _ in range(n)]
        )
        weights = torch.full_like(chosen, 1 / sum(text.tokens for text in TEXTS))
        tokens = Tokens(torch.full_like(chosen, BEHAVIOUR), advantages, weights)
        cispo.value(chosen, tokens, Band(0.0, CAP)).backward()
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


def _gradients(base: Path, plain: Any) -> tuple[float, float | None]:
    policy, own = Policy.load(base, dtype=torch.float32), _plain_gradient(plain)
    alone = _gradient_gap(_policy_gradient(policy, share=False), own)
    return alone, _gradient_gap(_policy_gradient(policy, share=True), own) if policy.shares_prompts else None


def _gradient_gap(ours: dict[str, Tensor], own: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm; a parameter that only one of the two moves counts whole."""
    names = sorted(ours.keys() | own.keys())
    difference = [(ours.get(n, torch.zeros(())) - own.get(n, torch.zeros(()))).double().square().sum() for n in names]
    whole = [own[n].double().square().sum() for n in own]
    return math.sqrt(float(sum(difference)) / float(sum(whole)))


def _gap(ours: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> float:
    """Largest difference; NaN when anything is."""
    gaps = [abs(a - b) for x, y in zip(ours, own, strict=True) for a, b in zip(x, y, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


# ---- the page ------------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HEAD = """# Architectures

<!-- Written by python -m benchmarks.architectures; a test holds that a new measurement writes the same. -->

Tiny random models of the families that people have, made from transformers' own configs: width 64, a few layers,
windows of 8 tokens, experts and recurrent layers as in the family. What was compared, in float32 on a CPU:

- **trained**: the trainer's log-probabilities and the gradient of a CISPO loss, against plain transformers and plain
  autograd, one text at a time;
- **prompts read once**: the same gradient when a prompt that several texts begin with is read once. *One by one*: the
  model keeps another memory than every token's key and value, and nothing is shared;
- **sampled in process**: the log-probabilities recorded with replies that were sampled side by side from prompts of
  several lengths, against plain transformers. *Slowly*: the whole text is read again for every token;
- **after an update**: what the engine scores and samples after an update was published and loaded, against the
  trainer;
- **vLLM**: what vLLM scores on a CPU when it is started on a model, and after a reload of other weights, against
  the trainer. The scores of every version are compared in a run, too: a reload that went wrong ends in a new start.
  *Started anew*: a reload would leave a mixture's experts as they were, so each version gets a new start at once.

*Equal* means within EQUAL_GAP nats, or that part of the gradient's norm; an engine that stayed behind would be off by
0.05 and more. These are kinds of models, not the models themselves: a real checkpoint has its tokenizer, its chat
template and its size on top, and `dspy-fst check FILE` looks at those.
"""


def page(outcomes: Sequence[Outcome], served: Mapping[str, str]) -> str:
    """The documentation's page; the same for measurements that differ by rounding alone.

    Args:
        served: Family -> what vLLM's column says.
    """
    lines = [
        "| family | model type | trained | prompts read once | sampled in process | after an update | vLLM |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        cells = [outcome.refused, "", "", ""] if outcome.refused is not None else _cells(outcome)
        cells.append(as_run(outcome.family, served.get(outcome.family, "")))
        lines.append(f"| {outcome.family} | `{outcome.model_type}` | {' | '.join(cells)} |")
    return HEAD.replace("EQUAL_GAP", f"{EQUAL:g}") + "\n" + "\n".join(lines) + "\n"


def _cells(outcome: Outcome) -> list[str]:
    shared = "one by one" if outcome.shared_gradient is None else _equal(outcome.shared_gradient)
    return [
        _equal(max(outcome.score, outcome.gradient)),
        shared,
        _equal(outcome.sampled) + (", slowly" if outcome.slowly else ""),
        _equal(outcome.published),
    ]


def _equal(gap: float) -> str:
    return "equal" if gap <= EQUAL else f"off by {gap:.1g}"


def measured(family: Family) -> Outcome:
    """`measure` in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(family, Path(folder))


def main() -> None:
    """Measure and write the page; see the module."""
    transformers.logging.disable_progress_bar()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"vllm": {}, "in_process": {}}
    if sys.argv[1:2] == ["--vllm"]:
        known["vllm"] = serve_all(sys.argv[2:], known["vllm"])
    else:
        known["in_process"] = {family.name: asdict(measured(family)) for family in FAMILIES}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page([Outcome(**known["in_process"][family.name]) for family in FAMILIES], known["vllm"]))


if __name__ == "__main__":
    main()
