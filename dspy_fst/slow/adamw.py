"""AdamW with moments of 32 or 8 bits. In: the trained parameters. Out: an optimizer, and its state as tensors.

Moments of 8 bits are bitsandbytes' (Dettmers et al., arXiv 2110.02861): a code of one byte for each number, and a scale
in float32 for each block of 256. Parameters of fewer than 4,096 numbers keep moments in float32, as the library has it.
Read from bitsandbytes 0.50.2 (`optim/optimizer.py`). The weights that it moves are float32 in both.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dspy_fst.errors import TrainingError
from dspy_fst.slow.ranks.sharding import part_for
from dspy_fst.slow.training_settings import TrainingSettings

Bits = Literal[32, 8]
MOMENTS: dict[Bits, tuple[str, ...]] = {
    32: ("step", "exp_avg", "exp_avg_sq"),
    8: ("step", "state1", "state2", "absmax1", "absmax2"),
}
"""State of a parameter, as torch and bitsandbytes name it. What the codes of 8 bits stand for is not state."""


def make_adamw(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW over these parameters, without state yet.

    Raises:
        TrainingError: moments of 8 bits are wanted, and bitsandbytes is not installed.
    """
    if settings.optimizer == "adamw_8bit":
        return _eight_bit(parameters, settings)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _eight_bit(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(f"optimizer='adamw_8bit': bitsandbytes cannot be imported ({error})") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer


def bits_of(optimizer: torch.optim.Optimizer) -> Bits:
    """Of the moments."""
    return 32 if isinstance(optimizer, torch.optim.AdamW) else 8


def moments_of(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, as ``MOMENT/PARAMETER``; nothing for parameters that no update has moved.

    Args:
        parameters: The trained parameters by name.
    """
    wanted = MOMENTS[bits_of(optimizer)]
    return {
        f"{moment}/{name}": torch.as_tensor(held[moment])
        for name, parameter in parameters.items()
        for held in (optimizer.state.get(parameter, {}),)
        for moment in wanted
        if moment in held
    }


def restore_moments(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Give the optimizer what `moments_of` returned; a parameter that it does not hold starts without.

    Args:
        tensors: More than the moments may be in it.
        parameters: The trained parameters by name, in the optimizer's order.

    Raises:
        TrainingError: the moments are of the other optimizer's kind.
    """
    bits = bits_of(optimizer)
    if any(name.startswith("state1/" if bits == 32 else "exp_avg/") for name in tensors):
        raise TrainingError(f"the state holds moments of {40 - bits} bits, and this optimizer's have {bits}")
    state: dict[int, dict[str, object]] = {
        index: {
            moment: tensors[key] if moment == "step" else part_for(parameter, tensors[key])
            for moment in MOMENTS[bits]
            if (key := f"{moment}/{name}") in tensors
        }
        for index, (name, parameter) in enumerate(parameters.items())
        if f"step/{name}" in tensors
    }
    if bits == 8:
        _add_codes(state, optimizer)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _add_codes(state: Mapping[int, dict[str, object]], optimizer: torch.optim.Optimizer) -> None:
    """Complete moments of 8 bits by the tables that every parameter shares, and the step as a plain number."""
    codes = optimizer.name2qmap  # type: ignore[attr-defined]
    for held in state.values():
        held["step"] = int(held["step"])  # type: ignore[call-overload]
        if "absmax1" in held:
            held |= {"qmap1": codes["dynamic"], "qmap2": codes["udynamic"]}
