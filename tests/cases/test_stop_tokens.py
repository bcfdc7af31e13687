"""Files that name different end tokens: a reply ends at each of them, and keeps it, whichever engine samples."""

import json
from contextlib import contextmanager

import pytest
from dspy import lm15
from transformers import AutoTokenizer

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.in_process import InProcessEngine
from tests.cases.real_tokenizer import save_model

END_OF_TEXT, END_OF_TURN = 0, 2
"""SmolLM2's ``<|endoftext|>`` and ``<|im_end|>``; the latter is its tokenizer's eos_token."""


def folder_with(tmp_path, config, generation):
    """A model whose two config files name these end tokens; None writes none."""
    folder = save_model(tmp_path / "model")
    for name, eos in (("config.json", config), ("generation_config.json", generation)):
        settings = json.loads((folder / name).read_text())
        settings.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(settings | ({} if eos is None else {"eos_token_id": eos})))
    return folder


@contextmanager
def saying(engine, token):
    """The engine's model says nothing but this token meanwhile."""

    def only(_module, _inputs, output):
        output.logits.fill_(-1e4)
        output.logits[..., token] = 0.0
        return output

    hook = engine._model.register_forward_hook(only)
    yield
    hook.remove()


def reply_of(engine, token):
    """Up to eight tokens of a model that says nothing but this one."""
    request = lm15.Request("m", (lm15.Message.user("hi"),), config=lm15.Config(max_tokens=8, temperature=1.0))
    with saying(engine, token):
        return engine.complete(request, 1)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (None, END_OF_TEXT, {END_OF_TEXT, END_OF_TURN}),
        (END_OF_TEXT, None, {END_OF_TEXT, END_OF_TURN}),
        (500, [END_OF_TEXT, 600], {END_OF_TEXT, END_OF_TURN, 500, 600}),
        (None, None, {END_OF_TURN}),
    ],
)
def test_a_reply_ends_at_every_token_that_any_file_names(tmp_path, config, generation, ends):
    engine = InProcessEngine()
    engine.load(Checkpoint("v0", folder_with(tmp_path, config, generation)))
    for end in sorted(ends):
        reply = reply_of(engine, end)
        assert (reply.finish_reason, reply.completion_ids) == ("stop", (end,))
        assert reply.response.text == ""  # an end token is no word of the reply, special or not
        assert len(reply.logprobs) == 1
    reply = reply_of(engine, 700)
    assert (reply.finish_reason, reply.completion_ids) == ("length", (700,) * 8)
    engine.close()


def test_the_server_is_told_of_them_beside_those_of_the_request():
    from dspy_fst.engine.replies import with_stop_tokens

    request = lm15.Request("m", (lm15.Message.user("hi"),), config=lm15.Config(extensions={"stop_token_ids": [9]}))
    assert with_stop_tokens(request, frozenset({2, 0})).config.extensions == {"stop_token_ids": [0, 2, 9]}
    plain = lm15.Request("m", (lm15.Message.user("hi"),))
    assert with_stop_tokens(plain, frozenset()) == plain


def test_a_multimodal_config_names_its_end_token_in_its_text_part(tmp_path):
    from dspy_fst.engine.replies import stop_ids

    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [7, 8]}, "eos_token_id": True}))
    assert stop_ids(tmp_path, None) == {7, 8}
    (tmp_path / "generation_config.json").write_text("not json")
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    assert stop_ids(tmp_path, tokenizer) == {END_OF_TURN, 7, 8}
