"""Runs inside vLLM's workers: compares the weights that the forward pass uses with those that the trainer sends.

vLLM's own engine receives the tensors, as it does for an update (0.32, `distributed/weight_transfer`). What it takes
for the model here compares each of them, and loads none.
"""

from types import SimpleNamespace
from typing import Any

import torch
from dspy_fst_weight_check import Comparison  # type: ignore[import-not-found]


def compare_sent(engine: Any, update_info: dict[str, object]) -> Comparison:
    """The comparison with all tensors of one transfer, none of which is loaded; no step of the engine runs meanwhile.

    Args:
        engine: The worker's weight-transfer engine.
        update_info: As its ``update_weights`` takes it.
    """
    comparison = Comparison(engine.model, engine.model_config)
    with torch.no_grad(), comparison.taking() as take:
        engine.set_weight_update_target(SimpleNamespace(load_weights=take), engine.model_config)
        try:
            engine.update_weights(update_info)
        finally:
            engine.reset_weight_update_target()
    return comparison
