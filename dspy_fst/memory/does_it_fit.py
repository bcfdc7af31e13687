"""Whether a run fits: what its parts allocate against what is free, place by place; and the micro-batch that fits.

``micro_batch_tokens="auto"`` is the largest power of two, within bounds, whose *at most* figure fits. If none does, it
is the largest whose *expected* figure fits, and a warning says so.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dspy_fst.config import FSTConfig
from dspy_fst.engine.machine import Launch
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.formatting.numbers import format_bytes
from dspy_fst.memory.allocation import Allocation, Workload, Writes
from dspy_fst.memory.arithmetic import LARGEST_ON_CPU, LARGEST_ON_GPU, SMALLEST
from dspy_fst.memory.available import DISK, GPU, Available, available_now
from dspy_fst.memory.bytes_by_part import (
    CACHED_TOKENS,
    ENGINE,
    FEWEST_CACHED_TOKENS,
    LARGEST_SHARE,
    MUCH_WRITTEN,
    TRAINER,
    allocations_of,
    known_options,
    served_bytes,
    trained_numbers,
    update_range,
    vllm_share,
    writes_of,
)
from dspy_fst.memory.requirement import Requirement
from dspy_fst.memory.shape import ModelSize, find_size, model_size
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.recipe.lora_settings import LoRA

SPARE = 0.05
"""Share of the memory left for an update that a chosen micro-batch leaves free for allocators (ours)."""
TURNS = "; or let vLLM sleep during updates, with which all fits: engine_options={'sleep_level': 1}"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on a machine, and whether it fits."""

    workload: Workload
    requirements: tuple[Requirement, ...]
    writes: Writes
    micro_batch_tokens: int
    """The recipe's number, or the one that was chosen for ``"auto"``."""
    chosen: bool = False
    """Whether the recipe says ``"auto"``."""
    share_fault: str | None = None
    """Why vLLM's share of the card cannot hold the weights; None when it can."""
    reply_limit: int | None = None
    """Tokens of the longest reply that fits, where replies may be longer than that; None when every reply fits."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass: as the recipe says, or because of ``needed``."""
    needed: str = ""
    """Why ``"auto"`` turned that on; empty where it did not."""
    trained: int = 0
    """How many numbers training may change; 0 where texts alone are searched."""
    adapter: bool = False
    """Whether these are LoRA adapters'."""
    way_out: str = ""
    """Settings with which a LoRA adapter is expected to fit, where training all weights does not."""
    turns_help: bool = False
    """Whether all fits if vLLM sleeps during updates, where it does not or may not otherwise."""

    @property
    def parameters(self) -> int:
        return self.workload.size.parameters

    def faults(self) -> list[str]:
        """A sentence for every place whose certain requirement does not fit."""
        sentences = [fault for requirement in self.requirements if (fault := requirement.fault(self.named))]
        if self.share_fault:
            sentences.append(self.share_fault)
        if sentences and self.turns_help:
            sentences[0] += TURNS
        if sentences and self.way_out:
            sentences[-1] += f"; or train a LoRA adapter, which is expected to fit: {self.way_out}"
        return sentences

    def doubts(self) -> list[str]:
        """A sentence for every place whose peak may not fit, and for a model whose size is partly a guess."""
        sentences = [warning for requirement in self.requirements if (warning := requirement.warning(self.named))]
        if sentences and self.turns_help:
            sentences[0] += TURNS
        if assumed := self.workload.size.assumed:
            sentences.append(
                f"{self.named}: its config.json does not set {', '.join(assumed)}, so transformers' defaults are "
                "counted; give the whole config.json"
            )
        return sentences

    def warnings(self) -> list[str]:
        """The doubts, and a sentence when the run writes very much."""
        warnings = self.doubts()
        if self.writes.total > MUCH_WRITTEN and self.writes.states:
            warnings.append(f"{DISK}: {self.writes.words}; raise checkpoint_every to write fewer states")
        return warnings

    @property
    def choice(self) -> str:
        """What is trained, and why; a sentence."""
        if not self.trained:
            return "trained: no weights, as method='gepa' searches texts alone"
        if self.adapter:
            count = self.workload.adapters
            adapters = "a LoRA adapter of" if count == 1 else f"{count} LoRA adapters, together of"
            return f"trained: {adapters} {counted(self.trained)} numbers, as the recipe's adapter says"
        if self.way_out:
            return f"trained: all weights, which do not fit; a LoRA adapter is expected to: {self.way_out}"
        fits = "" if self.faults() or not self.expected_to_fit else ", which fit"
        return f"trained: all weights{fits}"

    @property
    def surely_fits(self) -> bool:
        """Whether every place suffices for the longest texts, too, as far as the model's size is known."""
        told = [requirement.warning(self.named) for requirement in self.requirements]
        return not self.faults() and not any(told)

    @property
    def expected_to_fit(self) -> bool:
        """Whether every place suffices for typical texts; `reply_limit` says which replies are too long."""
        return all(requirement.expected <= requirement.free for requirement in self.requirements)

    @property
    def named(self) -> str:
        return f"model={self.workload.model!r} ({counted(self.parameters)} parameters)"


def counted(parameters: int) -> str:
    """
    >>> counted(8_190_735_360), counted(939_904)
    ('8.2B', '0.94M')
    """
    millions = parameters / 1e6
    return f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.3g}M"


def plan_memory(
    policy: PolicyLM, config: FSTConfig, run_dir: Path, available: Available | None = None, adapters: int = 1
) -> MemoryPlan | None:
    """The memory plan of a run with this model and recipe, whose settings must have been checked before.

    Args:
        available: What is free; None inspects this machine.
        adapters: How many LoRA adapters are trained, where any is.

    Returns:
        None when the size of the model is unknown until it is downloaded.
    """
    path = policy.checkpoint.path
    size = find_size(str(path)) if available is not None and available.imagined else model_size(path)
    if size is None:
        return None
    available = available or available_now(run_dir)
    launched = 1 if available.imagined else Launch.of().world
    ranks = max(launched, config.ranks) if config.sharding else 1
    workload = replace(_workload_of(policy, size, available), adapters=adapters, ranks=ranks)
    if policy.handle.engine.weights is not None:  # the student's engine runs, and is stopped before the run's starts
        available = _given_back(workload, config, available)
    return plan_for(workload, config, available)


def plan_for(workload: Workload, config: FSTConfig, available: Available) -> MemoryPlan:
    """The memory plan of this model and recipe on a machine with so much free."""
    plan = _with_gradient_checkpointing(workload, config, available)
    plan = replace(plan, turns_help=_turns_help(plan, workload, config, available))
    if config.adapter is not None or config.method == "gepa" or (not plan.faults() and plan.expected_to_fit):
        return plan
    return replace(plan, way_out=_way_out(workload, config, available))


def _turns_help(plan: MemoryPlan, workload: Workload, config: FSTConfig, available: Available) -> bool:
    """See `MemoryPlan.turns_help`. A server that was launched elsewhere, or has a card of its own, takes no turns."""
    place, _ = _allocation_of(ENGINE, plan.requirements)
    options = workload.options
    alone = workload.kind != "vllm" or place.place != GPU or options.get("attach_url") is not None
    alone = alone or options.get("weight_transfer", "disk") != "disk"  # refused with sleep_level
    if plan.surely_fits or alone or config.method == "gepa" or options.get("sleep_level") is not None:
        return False
    options = {**options, "sleep_level": 1}
    return _with_gradient_checkpointing(replace(workload, options=options), config, available).surely_fits


def _way_out(workload: Workload, config: FSTConfig, available: Available) -> str:
    """Settings with which a LoRA adapter is expected to fit; empty where none help."""
    config = config.model_copy(update={"adapter": LoRA()})
    shares = (
        [None] if workload.kind != "vllm" or not available.on_gpu else [None, *_shares(workload, config, available)]
    )
    for share in shares:
        options = workload.options if share is None else {**workload.options, "gpu_memory_utilization": share}
        plan = _with_gradient_checkpointing(replace(workload, options=options), config, available)
        if not plan.faults() and plan.expected_to_fit:
            return "adapter='lora'" + (
                "" if share is None else f", engine_options={{'gpu_memory_utilization': {share:g}}}"
            )
    return ""


def fitting_share(workload: Workload, config: FSTConfig, available: Available) -> float:
    """``gpu_memory_utilization`` with which a run fits: room for `CACHED_TOKENS`, or for fewer on a small card."""
    shares = _shares(workload, config, available)

    def fits(share: float) -> bool:
        options = {**workload.options, "gpu_memory_utilization": share}
        return plan_for(replace(workload, options=options), config, available).surely_fits

    return next(filter(fits, shares), shares[-1])


def _shares(workload: Workload, config: FSTConfig, available: Available) -> list[float]:
    """Shares of the card that vLLM works with, the largest first."""
    cached, shares = CACHED_TOKENS, []
    while cached >= FEWEST_CACHED_TOKENS:
        shares.append(vllm_share(workload, config, available, cached))
        cached //= 2
    return list(dict.fromkeys(shares))


def _with_gradient_checkpointing(workload: Workload, config: FSTConfig, available: Available) -> MemoryPlan:
    """The plan in which layers are computed again as the recipe says; by ``"auto"``, where an update needs it."""
    if config.gradient_checkpointing != "auto":
        return _plan_for(workload, config, available)
    ways = (config.model_copy(update={"gradient_checkpointing": way}) for way in (False, True))
    kept, again = (_plan_for(workload, way, available) for way in ways)
    place, trainer = _allocation_of(TRAINER, kept.requirements)
    left = place.free - place.certain
    if not 0 <= left < trainer.at_most:
        return kept
    needed = f"an update may take {format_bytes(trainer.at_most)} otherwise, and {format_bytes(left)} are left for it"
    return replace(again, needed=needed)


def _plan_for(workload: Workload, config: FSTConfig, available: Available) -> MemoryPlan:
    auto = config.micro_batch_tokens == "auto"
    tokens = largest_micro_batch(workload, config, available) if auto else int(config.micro_batch_tokens)
    requirements, reply_limit = with_reply_limit(
        tuple(_requirements(workload, config, tokens, available)), workload, config, tokens, available
    )
    return MemoryPlan(
        workload,
        requirements,
        writes_of(workload, config, on_gpu=available.on_gpu),
        tokens,
        chosen=auto,
        share_fault=_share_fault(workload, config, available, requirements),
        reply_limit=reply_limit,
        gradient_checkpointing=config.gradient_checkpointing is True,
        trained=0 if config.method == "gepa" else trained_numbers(workload, config),
        adapter=config.adapter is not None,
    )


def with_reply_limit(
    requirements: tuple[Requirement, ...], workload: Workload, config: FSTConfig, tokens: int, available: Available
) -> tuple[tuple[Requirement, ...], int | None]:
    """The requirements with advice that helps when a reply may be too long, and `MemoryPlan.reply_limit`.

    A reply longer than a micro-batch is a micro-batch of its own, so a smaller micro-batch does not help.
    """
    place, trainer = _allocation_of(TRAINER, requirements)
    left = place.free - place.certain
    if not (workload.longest_reply > tokens and 0 <= left < trainer.at_most):
        return requirements, None

    def at_most(length: int) -> int:
        return update_range(replace(workload, longest_reply=length), config, 1, on_gpu=available.on_gpu)[1]

    limit = bisect_right(range(1, workload.longest_reply + 1), left, key=at_most)
    too_large = config.micro_batch_tokens != "auto" and tokens > limit  # "auto" follows max_tokens by itself
    smaller = f" and micro_batch_tokens={tokens}" if too_large else ""
    relief = (
        f"lower max_tokens={workload.longest_reply}{smaller}: it fits only if replies stay under {limit + 1} tokens"
    )
    advised = replace(trainer, relief=relief if limit else "use a smaller model")
    allocations = tuple(advised if allocation is trainer else allocation for allocation in place.allocations)
    changed = replace(place, allocations=allocations)
    return tuple(changed if requirement is place else requirement for requirement in requirements), limit


def largest_micro_batch(workload: Workload, config: FSTConfig, available: Available) -> int:
    """The value of ``micro_batch_tokens="auto"``; `SMALLEST` when nothing is expected to fit."""
    sizes = list(_sizes(LARGEST_ON_GPU if available.on_gpu else LARGEST_ON_CPU))
    left = _left_for_updates(workload, config, available)
    ranges = {tokens: update_range(workload, config, tokens, on_gpu=available.on_gpu) for tokens in sizes}
    sure = [tokens for tokens, (_, at_most) in ranges.items() if at_most <= left]
    likely = [tokens for tokens, (expected, _) in ranges.items() if expected <= left]
    return max(sure or likely or sizes[:1])


def _left_for_updates(workload: Workload, config: FSTConfig, available: Available) -> float:
    requirements = _requirements(workload, config, SMALLEST, available)
    place, _ = _allocation_of(TRAINER, requirements)
    return (1 - SPARE) * (place.free - place.certain)


def _allocation_of(part: str, requirements: Iterable[Requirement]) -> tuple[Requirement, Allocation]:
    """The allocation of a part, and the place that it is in."""
    return next(
        (need, allocation) for need in requirements for allocation in need.allocations if allocation.part == part
    )


def _sizes(largest: int) -> Iterator[int]:
    tokens = SMALLEST
    while tokens <= largest:
        yield tokens
        tokens *= 2


def _requirements(workload: Workload, config: FSTConfig, tokens: int, available: Available) -> Iterator[Requirement]:
    allocations = allocations_of(workload, config, tokens, available)
    for place, free in available.free.items():
        if here := tuple(allocation for allocation in allocations if allocation.place == place):
            yield Requirement(place, here, free)


def _workload_of(policy: PolicyLM, size: ModelSize, available: Available) -> Workload:
    """The model and its engine; on a described machine ``engine="auto"`` is what that machine would use."""
    kind, options = policy.handle.resolved_kind, policy.handle.options
    if available.imagined and policy.handle.kind == "auto":
        kind = "vllm" if available.on_gpu else "in_process"
        options = known_options(VLLMSettings if kind == "vllm" else InProcessSettings, options)
    return Workload(policy.model, size, kind, options, policy.reply_limit or 0)


def _given_back(workload: Workload, config: FSTConfig, available: Available) -> Available:
    engine = next(
        allocation for allocation in allocations_of(workload, config, SMALLEST, available) if allocation.part == ENGINE
    )
    held = engine.certain + engine.sure
    free = {place: free + held * (place == engine.place) for place, free in available.free.items()}
    return Available(free, available.gpu_total, available.imagined)


def _share_fault(
    workload: Workload, config: FSTConfig, available: Available, requirements: tuple[Requirement, ...]
) -> str | None:
    """Why vLLM's share of the card cannot hold the weights, so that the server would exit while it boots."""
    if workload.kind != "vllm" or not available.on_gpu or workload.options.get("attach_url"):
        return None
    share = VLLMSettings(**workload.options).gpu_memory_utilization
    least = served_bytes(workload, config)
    if least < share * available.gpu_total:
        return None
    place, engine = _allocation_of(ENGINE, requirements)
    others = sum(other.with_cuts(other.sure) - other.given_back for other in place.allocations if other is not engine)
    helps = least < LARGEST_SHARE * available.gpu_total and others + least <= place.free
    advice = "raise it" if helps else "use a smaller model, or a larger card"
    return (
        f"engine_options: gpu_memory_utilization={share:g} is {format_bytes(int(share * available.gpu_total))} of "
        f"{format_bytes(available.gpu_total)}, and vLLM's weights of {workload.model} alone take "
        f"{format_bytes(least)}; {advice}"
    )
