"""What the ranks of a test learn: batches, and the cases that are trained alike by one process and by several."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.ranks.ranks import ALONE, Ranks, on_all_ranks, whole
from dspy_fst.slow.ranks.roles import make_trainer
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, SeedKLCall, UpdateReport
from tests.slow.makers import VOCABULARY, make_batch, make_call, make_row

STEPS = 5
TEXTS = [[5, 3, 8, 1], [2, 9, 4]]
SETTINGS = TrainingSettings(
    learning_rate=1e-3, warmup_steps=1, micro_batch_tokens=24, max_grad_norm=0.5, min_effective_share=0.0
)
LORA = TrainingSettings(**{**SETTINGS.model_dump(), "adapter": LoRA(rank=4)})


@dataclass(frozen=True)
class Case:
    """One way to train."""

    model: str
    settings: TrainingSettings = SETTINGS
    adapters: Mapping[str, str] = field(default_factory=dict)

    def with_settings(self, **changes: object) -> "Case":
        return replace(self, settings=self.settings.model_copy(update=changes))

    def trainer(self, models: Path, ranks: Ranks = ALONE) -> Trainer:
        return make_trainer(
            ranks, models / self.model, self.settings, device="cpu", adapters=dict(self.adapters), seed=3
        )


STATES = ("full", "lora")
"""Cases whose states move between processes."""
SHARDED = {"sharding": "fsdp", "gradient_checkpointing": True}
CASES = {
    "full": Case("untied").with_settings(seed_kl_coefficient=0.1),
    "tied": Case("tied").with_settings(loss="gspo"),
    "lora": Case("untied", LORA),
    "tied lora": Case("tied", LORA, {"ask": "first", "answer": "second"}),
    "quantized lora": Case("untied", LORA).with_settings(quantized_base="int8"),
}
WAYS: Mapping[str, Mapping[str, object]] = {"": {}, "sharded": SHARDED}
"""How the ranks share the weights -> settings."""
SHAREABLE = {name: case for name, case in CASES.items() if case.settings.quantized_base is None}
"""Cases whose weights the ranks can share out."""
TRAINED = [*((name, "") for name in CASES), *((name, "sharded") for name in SHAREABLE)]
"""Each case in each way in which it can be trained."""


def a_batch(number: int, rows: int = 7) -> Batch:
    """Rows of two predictors, of many lengths, and a few seed-KL calls."""
    draw = random.Random(number)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(VOCABULARY - 2) for _ in range(draw.randint(2, longest))]

    made = []
    for place in range(rows):
        prompt, completion = ids(9), ids(6)
        row = make_row(prompt, completion, [-3.0] * len(completion), draw.uniform(-1, 1), 0.05)
        made.append(replace(row, predictor="ask" if place % 2 else "answer"))
    calls = [make_call(ids(5), ids(5)) for _ in range(3)]
    kept = tuple(
        SeedKLCall(call, tuple(ids(9 * place)) if place else call.prompt_ids) for place, call in enumerate(calls)
    )
    return replace(make_batch(made), seed_kl_calls=kept)


def trained(trainer: Trainer, first: int = 0, steps: int = STEPS) -> list[UpdateReport]:
    """Every fourth batch has one row: some ranks have no micro-batch, and some adapters no rows."""
    return [trainer.step(a_batch(number, 1 if number % 4 == 3 else 7)) for number in range(first, first + steps)]


@on_all_ranks
def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The weights, whole on every rank; a method for those that call a trainer with others."""
    return {name: whole(parameter).detach().clone() for name, parameter in trainer.parameters.items()}


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def furthest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest distance of two numbers at the same place."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def fresh(model: Path) -> dict[str, Tensor]:
    """The weights before any step."""
    return weights_of(Trainer(model, SETTINGS, device="cpu"))


def saved(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
