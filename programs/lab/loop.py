"""Fast-Slow Training in one file, to read and to teach (arXiv 2605.12484): `python -m programs.lab.loop`, a minute.

A policy is pi(y | theta, phi, x): weights theta, an instruction phi in the prompt, a problem x, a reply y. RL trains
theta alone. Here both change, in turns and for the same reward. Fast: GEPA searches for better instructions while the
weights stay. Slow: CISPO updates the weights while a population of K instructions stays. The laboratory lends the task
(digits under a hidden rule), its metric, a model of a million parameters, and a proposer of instructions for GEPA.

Left out, and found in `dspy_fst`: programs of several calls, sampling by vLLM and its exact tokens, the KL term to the
starting weights, masks for rollouts that measured nothing, validation and the choice of the best state, checkpoints and
resume, micro-batches, GPUs and FP32 logits there. Also simpler here: GEPA starts from the best instruction alone (the
others of the population compete again when it is done), measures anew what it measured before, and the next population
is chosen from all candidates, not from the Pareto frontier of them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dspy
import gepa
import torch
from gepa.core.adapter import EvaluationBatch
from gepa.core.result import GEPAResult
from torch import Tensor

from programs.lab import BASE, FeedbackProposer, Lab, build
from programs.lab.measure import load, parse
from programs.lab.tokenizer import messages

CYCLES, STEPS, PROBLEMS = 4, 6, 32  # cycles; updates in a cycle; problems in an update
K, G = 4, 8  # instructions in the population; rollouts of each problem in an update, G / K under each instruction
ANCHORS, SEARCH, MINIBATCH = 32, 240, 4  # a search's problems; its rollouts in all; those shown to one reflection
CAP, LEARNING_RATE, WARMUP = 4.0, 5e-4, 10  # largest importance weight; for a million parameters; first updates


@dataclass(frozen=True)
class Rollouts:
    """N replies: prompts of P tokens, padded on the left, then replies of L, padded on the right."""

    ids: Tensor  # (N, P + L)
    attention: Tensor  # (N, P + L), 0 on padding
    sampled: Tensor  # (N, L), 1 on the reply's tokens, its end-of-turn token included
    behaviour: Tensor  # (N, L), the log-probability that each token was sampled with
    rewards: Tensor  # (N,)
    records: list[dict[str, Any]]  # for reflection: the input, the output and the metric's feedback of each


Play = Callable[[Sequence[tuple[dspy.Example, str]]], Rollouts]  # one rollout for each (problem, instruction)


def train(lab: Lab, *, seed: int = 0, cycles: int = CYCLES, tell: Callable[[str], None] = print) -> list[float]:
    """The method. Returns the mean reward of every step, between mean@4 on the test set before and after."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    policy, tokenizer = load(BASE)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP - 1)

    play = partial(sample, policy, tokenizer, lab)  # publishing: the model that learns is the model that samples
    population = [lab.world.seed_instruction] * K
    rewards = [play([(problem, population[0]) for problem in lab.testset * 4]).rewards.mean().item()]
    for cycle in range(cycles):
        lookahead = rng.sample(lab.trainset, STEPS * PROBLEMS)  # all problems of this cycle's updates
        population = evolve(population, rng.sample(lookahead, ANCHORS), play, seed + cycle)  # fast
        tell(f"cycle {cycle}: {len(set(population))} different instructions, the best: {population[0]}")
        for step in range(STEPS):  # slow
            batch = lookahead[step * PROBLEMS : (step + 1) * PROBLEMS]
            groups = play([(problem, text) for problem in batch for text in population for _ in range(G // K)])
            if is_live(groups.rewards.view(-1, G)).any():  # else AdamW's momentum alone would move the weights
                loss_of(policy, groups).backward()
                optimizer.step()
                optimizer.zero_grad()
                warmup.step()
            rewards.append(groups.rewards.mean().item())
            tell(f"cycle {cycle}, step {step}: mean reward {rewards[-1]:.3f}")
    rewards.append(play([(problem, population[0]) for problem in lab.testset * 4]).rewards.mean().item())
    tell(f"mean@4 on {len(lab.testset)} held-out problems: {rewards[0]:.3f} before, {rewards[-1]:.3f} after")
    return rewards


# Fast: texts change, weights do not.


class Search:
    """What GEPA asks of a system (its GEPAAdapter): scores of a candidate, and records to reflect on."""

    propose_new_texts = None  # evolve() names a proposer

    def __init__(self, play: Play):
        self.play = play

    def evaluate(self, batch: list[dspy.Example], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        made = self.play([(problem, candidate["solve"]) for problem in batch])
        return EvaluationBatch(outputs=made.records, scores=made.rewards.tolist(), trajectories=made.records)

    def make_reflective_dataset(self, candidate: dict[str, str], evaluated: Any, components: list[str]) -> Any:
        return {"solve": evaluated.trajectories}

    def log(self, message: str) -> None:
        """GEPA's running commentary; nobody listens."""


def evolve(population: list[str], anchors: list[dspy.Example], play: Play, seed: int) -> list[str]:
    """The next K instructions, best first, by their rewards on the anchors under the current weights."""
    search: Any = Search(play)
    found: GEPAResult[Any, int] = gepa.optimize(
        seed_candidate={"solve": population[0]},
        trainset=anchors,  # and, without a valset, what every accepted candidate is scored on
        adapter=search,
        custom_candidate_proposer=FeedbackProposer(seed),
        reflection_minibatch_size=MINIBATCH,
        max_metric_calls=SEARCH,
        logger=search,
        seed=seed,
    )
    scored = zip(found.candidates, found.val_subscores, strict=True)
    scores = {candidate["solve"]: [row[anchor] for anchor in range(len(anchors))] for candidate, row in scored}
    for text in population:
        if text not in scores:
            scores[text] = search.evaluate(anchors, {"solve": text}).scores
    return top_k(scores, K)


def top_k(scores: dict[str, list[float]], k: int) -> list[str]:
    """One by one, the text that raises the sum over anchors of the best score of the chosen most.

    Copies of the best fill up the population once no text raises it.
    """
    pool = sorted(scores, key=lambda text: -sum(scores[text]))
    chosen, covered = [pool[0]], scores[pool[0]]
    while len(chosen) < k:
        totals = [sum(map(max, covered, scores[text])) for text in pool]
        chosen.append(pool[totals.index(max(totals))])  # of equals the one with the higher mean, which stands first
        covered = list(map(max, covered, scores[chosen[-1]]))
    return chosen


# Slow: weights change, texts do not.


def loss_of(policy: Any, made: Rollouts) -> Tensor:
    """The loss of one update, over problems x G rollouts, those of a problem side by side."""
    replies = made.ids[:, -made.sampled.shape[1] :]
    logits = policy(made.ids, attention_mask=made.attention).logits[:, -replies.shape[1] - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, replies[..., None])[..., 0]
    rewards = made.rewards.view(-1, G)
    return cispo(logprobs, made.behaviour, advantages(rewards).view(-1, 1), token_weights(rewards, made.sampled))


def cispo(logprobs: Tensor, behaviour: Tensor, advantage: Tensor, weights: Tensor) -> Tensor:
    """-sum of w sg(min(pi_theta / pi_behaviour, CAP)) A log pi_theta: a capped ratio, and a gradient of every token."""
    ratio = (logprobs.detach() - behaviour).exp().clamp(max=CAP)
    return -(weights * ratio * advantage * logprobs).sum()


def advantages(rewards: Tensor) -> Tensor:
    """(problems, G) -> same: (r - mean) / std over a problem's G rollouts, those of all K instructions together."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-6)


def token_weights(rewards: Tensor, sampled: Tensor) -> Tensor:
    """(problems, G), (N, L) -> (N, L): the mean over a problem's tokens, then over the problems that are live."""
    live = is_live(rewards)
    tokens = sampled.view(len(rewards), -1).sum(1)
    return (live / (live.sum() * tokens)).repeat_interleave(rewards.shape[1])[:, None] * sampled


def is_live(rewards: Tensor) -> Tensor:
    """(problems, G) -> (problems,): whether rewards differ; a problem whose rollouts all earn the same is dropped."""
    return rewards.amax(1) > rewards.amin(1)


# Rollouts: the policy answers, the metric judges.


@torch.no_grad()
def sample(policy: Any, tokenizer: Any, lab: Lab, tasks: Sequence[tuple[dspy.Example, str]]) -> Rollouts:
    """One reply at temperature 1 to each problem, asked as dspy.Predict asks under the instruction, and its reward."""
    chats = [messages(text, problem.numbers) for problem, text in tasks]
    shape = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **shape)
    draw = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 16}
    out = policy.generate(**prompts, **draw, output_logits=True, return_dict_in_generate=True)
    replies = out.sequences[:, prompts["input_ids"].shape[1] :]
    ends = (replies == tokenizer.eos_token_id).long()
    sampled = (ends.cumsum(1) - ends == 0).long()
    behaviour = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, replies[..., None])[..., 0]
    records, rewards = [], []
    for (problem, _), reply in zip(tasks, tokenizer.batch_decode(replies, skip_special_tokens=True), strict=True):
        answer = parse(reply)  # None if ChatAdapter cannot read it: the policy's doing, so it earns 0
        judged = lab.metric(problem, dspy.Prediction(answer=answer or ""))
        said = reply if answer is None else {"answer": answer}
        records.append({"Inputs": {"numbers": problem.numbers}, "Generated Outputs": said, "Feedback": judged.feedback})
        rewards.append(judged.score)
    attention = torch.cat([prompts["attention_mask"], sampled], 1)
    return Rollouts(out.sequences, attention, sampled, behaviour, torch.tensor(rewards), records)


if __name__ == "__main__":
    train(build("reverse_drop"))
