"""A reply's log-probabilities are in its response for who asks for them, in process as on vLLM."""

import pytest
import torch
from dspy import lm15
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspy_fst import PolicyLM
from programs.lab import BASE


@pytest.fixture
def policy():
    policy = PolicyLM(BASE, engine="in_process", max_tokens=8, engine_options={"device": "cpu", "dtype": "float32"})
    yield policy
    policy.release()


def test_the_log_probability_of_every_sampled_token_is_told(policy):
    """On 845e963: {"content": []}."""
    (output,) = policy("x", logprobs=True)
    entries = output["logprobs"]["content"]
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    request = lm15.Request("m", (lm15.Message.user("x"),), config=lm15.Config(logprobs=0, max_tokens=8))
    completion = policy.handle.ready().complete(request, seed=3)
    ids = torch.tensor([[*completion.prompt_ids, *completion.completion_ids]])
    with torch.no_grad():
        scored = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    told = completion.response.logprobs
    assert [entry.logprob for entry in told] == pytest.approx(
        scored[len(completion.prompt_ids) - 1 :].tolist(), abs=1e-4
    )
    assert [entry.token_id for entry in told] == list(completion.completion_ids)
    assert [entry.token for entry in told] == [tokenizer.decode([number]) for number in completion.completion_ids]
    assert 0 < len(entries) <= 8
    assert all(entry["logprob"] <= 0 and entry["top_logprobs"] == [] for entry in entries)
    text = "".join(entry["token"] for entry in entries)
    assert text.startswith(output["text"])


def test_nothing_is_told_to_who_does_not_ask(policy):
    (output,) = policy("x")
    assert isinstance(output, str)


def test_likeliest_tokens_are_refused_where_nobody_knows_them(policy):
    with pytest.raises(Exception, match=r"top_logprobs=3: the in-process engine tells the log-prob"):
        policy("x", logprobs=True, top_logprobs=3)
