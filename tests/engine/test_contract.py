"""What every engine promises, asked of both: in process, and a real vLLM server, which gets its weights back."""

from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
import torch
from dspy import lm15
from dspy.utils.exceptions import ContextWindowExceededError
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import Expected, verify, verify_identity, verify_numbers
from dspy_fst.errors import SyncError
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Candidate, Problem
from programs.lab import BASE, build
from programs.lab.tokenizer import signature
from tests.relay import Relay, any_answer
from tests.test_compile import propose

SEQUENCES = [[2, 30, 31, 32, 33], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module", params=["in_process", pytest.param("vllm", marks=pytest.mark.vllm)])
def policy(request, tmp_path_factory):
    """A PolicyLM whose engine serves a published copy of the base model."""
    options = request.getfixturevalue("lab_on_vllm").vllm if request.param == "vllm" else {}
    policy = PolicyLM(BASE, engine=request.param, max_tokens=12, engine_options=options)
    trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-4))
    engine = policy.handle.engine
    assert engine.weights is None
    engine.load(trainer.publish(tmp_path_factory.mktemp("base") / "v0", "v0"))
    yield policy
    if request.param == "vllm":
        engine.load(Checkpoint("base", BASE))
    engine.close()
    engine.close()


@pytest.fixture
def engine(policy):
    return policy.handle.engine


def request_of(numbers, max_tokens=12, temperature=1.0):
    messages = dspy.ChatAdapter().format(signature("Reverse the list."), [], {"numbers": numbers})
    system, user = messages[0]["content"], messages[1]["content"]
    config = lm15.Config(max_tokens=max_tokens, temperature=temperature)
    return lm15.Request(model="policy", system=system, messages=(lm15.Message.user(user),), config=config)


def scored(folder, sequence):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([list(sequence)])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def test_prompt_ids_are_the_chat_template_s(engine):
    request = request_of("1 2 3 4")
    completion = engine.complete(request, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    messages = [
        {"role": "system", "content": request.system},
        {"role": "user", "content": request.messages[0].text},
    ]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert completion.prompt_ids == tuple(rendered["input_ids"])
    assert tokenizer.decode(completion.completion_ids, skip_special_tokens=True) == completion.response.text
    assert completion.weights == "v0"
    assert completion.response.provider_data is None


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(engine, temperature):
    requests = [request_of(f"{i} 2 3 {i} 5", temperature=temperature) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        completions = list(pool.map(lambda pair: engine.complete(pair[1], pair[0]), enumerate(requests)))
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for completion in completions:
        ids = torch.tensor([[*completion.prompt_ids, *completion.completion_ids]])
        with torch.no_grad():
            logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
        expected = logprobs.gather(-1, ids[0, 1:, None])[-len(completion.completion_ids) :, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_reply_that_is_cut_says_so_and_one_that_ends_keeps_its_stop_token(engine):
    cut = engine.complete(request_of("1 2 3 4", max_tokens=2), seed=3)
    assert (cut.finish_reason, len(cut.completion_ids)) == ("length", 2)
    whole = engine.complete(request_of("1 2 3 4", max_tokens=64, temperature=0.1), seed=3)
    assert whole.finish_reason == "stop"
    assert whole.completion_ids[-1] == AutoTokenizer.from_pretrained(BASE).eos_token_id


def test_a_prompt_that_leaves_little_of_the_context_gets_a_short_reply_that_says_length(engine):
    prompt = len(engine.complete(request_of("1 " * 500, max_tokens=1), seed=1).prompt_ids)
    longest = request_of("1 " * (500 + 1024 - prompt - 4), max_tokens=64)
    cut = engine.complete(longest, seed=1)
    assert cut.finish_reason == "length"
    assert len(cut.completion_ids) == 1024 - len(cut.prompt_ids) < 64


def test_different_seeds_draw_differently(engine):
    replies = {
        engine.complete(request_of("1 2 3 4 5 6", temperature=2.0), seed=seed).completion_ids for seed in range(12)
    }
    assert len(replies) > 1


def test_scores_are_the_model_s(engine):
    assert engine.score(SEQUENCES)[0] == pytest.approx(scored(BASE, SEQUENCES[0]), abs=1e-4)
    assert engine.score(SEQUENCES)[1] == pytest.approx(scored(BASE, SEQUENCES[1]), abs=1e-4)


def test_a_prompt_beyond_the_context_is_the_request_s_fault(engine):
    lm = dspy.LM("policy", engine=Direct(engine), cache=False, max_tokens=8)
    predictor = dspy.Predict(signature("Reverse the list."))
    predictor.lm = lm
    with pytest.raises(ContextWindowExceededError):
        predictor(numbers="1 " * 2000)


class Direct:
    """DSPy's engine contract straight onto ours."""

    def __init__(self, engine):
        self.engine = engine

    def complete(self, request):
        return self.engine.complete(request, seed=1).response


def test_sampling_that_training_does_not_score_is_refused(engine):
    config = lm15.Config(max_tokens=4, top_p=0.5)
    request = lm15.Request(model="policy", messages=(lm15.Message.user("x"),), config=config)
    with pytest.raises(lm15.UnsupportedFeatureError, match="top_p"):
        engine.complete(request, seed=1)


def test_every_recorded_token_of_a_program_is_exact(policy):
    """32 rollouts at once, two modules, one to three calls of the first: ids, log-probabilities, attribution."""
    program = Relay()
    program.set_lm(policy)
    lab = build(train=16, val=1, test=1)
    seed = read_texts(program)
    candidates = [seed, Candidate({**seed.texts, "last": "Double the last number."})]
    rollouter = Rollouter(program, Reward(any_answer), RolloutSettings(num_threads=32), policy.handle.engine.expect)
    tasks = [Task(Problem(i, e), c) for i, e in enumerate(lab.trainset) for c in candidates]
    rollouts = rollouter.rollout(tasks, "exact")
    trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-4))

    for task, rollout in zip(tasks, rollouts, strict=True):
        if rollout.failure is None:
            length = len(task.problem.example.numbers.split())
            assert [call.predictor for call in rollout.calls] == ["first"] * (length - 3) + ["last"]
        assert rollout.mask is None
        assert {call.weights for call in rollout.calls} == {"v0"}
        for call in rollout.calls:
            spoken = task.candidate.texts[call.predictor].lower()  # the lab's tokenizer lowers case
            assert spoken in trainer.tokenizer.decode(call.prompt_ids)
    calls = [call for rollout in rollouts for call in rollout.calls]
    assert len(calls) > 64
    gaps = [
        abs(a - b)
        for call, scored in zip(calls, trainer.logprobs(calls), strict=True)
        for a, b in zip(call.logprobs, scored, strict=True)
    ]
    assert max(gaps) < 1e-4


def test_new_weights_are_served_at_once_and_verified(engine, tmp_path):
    """Last but one of the module: it leaves other weights behind."""
    trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-4))
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    scores = trainer.score(SEQUENCES)
    with pytest.raises(SyncError, match="nats a token on average over 10 tokens"):
        verify_numbers(engine.score(SEQUENCES), scores, tolerance=2e-3, version="v1")
    checkpoint = trainer.publish(tmp_path / "v1", "v1")
    assert isinstance(checkpoint, Checkpoint)
    expected = Expected(checkpoint, SEQUENCES, scores, trainer.dtype)
    with pytest.raises(SyncError, match=r"uses other weights than were published: .*lm_head\.weight .* by up to"):
        verify(engine, expected)
    engine.load(checkpoint)
    assert engine.weights == "v1"
    proof = verify(engine, expected)
    assert proof.identical
    assert proof.mean_gap < 1e-4
    completion = engine.complete(request_of("1 2 3 4"), seed=1)
    assert completion.weights == "v1"
    expected = scored(tmp_path / "v1", (*completion.prompt_ids, *completion.completion_ids))
    assert completion.logprobs == pytest.approx(expected[-len(completion.completion_ids) :], abs=1e-4)


class Falling:
    """A metric whose validation scores rise after the first step of a run and fall after the second."""

    def __init__(self):
        self.steps = 0

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        if gold.kind == "val":
            return (0.5, 0.9, 0.1)[self.steps]
        return any_answer(gold, pred)

    def hear(self, event):
        self.steps += event["event"] == "step"


def examples(kind, count):
    return [dspy.Example(numbers=f"{n} 2 1 4", kind=kind).with_inputs("numbers") for n in range(count)]


@pytest.mark.slow
def test_a_run_that_falls_returns_its_best_weights_and_the_engine_serves_them(policy, tmp_path):
    """Last of the module: the server of the tests before gets the weights of a run that attaches to it."""
    kind, metric = policy.handle.resolved_kind, Falling()
    options = policy.handle.options if kind == "vllm" else {"linger_s": 60.0}
    program = Relay()
    program.set_lm(PolicyLM(BASE, engine=kind, max_tokens=12, temperature=1.5, engine_options=options))
    recipe = {"cycles": 1, "steps_per_cycle": 2, "problems_per_step": 4, "group_size": 4, "anchors": 2}
    recipe |= {"population_size": 2, "search_rollouts": 4, "learning_rate": 5e-3, "warmup_steps": 0}
    optimizer = FSTOptimizer(
        metric=metric,
        propose=propose,
        run_dir=tmp_path / "run",
        listeners=[metric.hear],
        progress=False,
        return_best=True,
        validate_every=1,
        **recipe,
    )
    compiled = optimizer.compile(program, trainset=examples("train", 8), valset=examples("val", 3))
    best, last = (tmp_path / "run" / "weights" / version for version in ("step-000001", "step-000002"))
    checkpoint, engine = policy_of(compiled).checkpoint, policy_of(compiled).handle.engine
    try:
        assert (checkpoint, engine.weights) == (Checkpoint("step-000001", best), "step-000001")
        assert compiled.population.scores[0] == pytest.approx(0.9)
        verify_identity(engine.held(checkpoint), checkpoint)
        for served, sequence in zip(engine.score(SEQUENCES), SEQUENCES, strict=True):
            assert served == pytest.approx(scored(best, sequence), abs=1e-4)
            assert served != pytest.approx(scored(last, sequence), abs=1e-3)
        assert engine.complete(request_of("1 2 3 4"), seed=1).weights == "step-000001"
    finally:
        policy_of(compiled).release()
