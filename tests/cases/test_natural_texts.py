"""What both sides score after a publish is the run's own text: prompts of the first examples, then what was played."""

import dspy
from transformers import AutoTokenizer

from dspy_fst import PolicyLM
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.publisher import LAST_RESORT, TEXT_TOKENS, TEXTS, NaturalTexts
from dspy_fst.types import Call, Candidate, Rollout
from programs.lab import BASE, build
from tests.relay import relay

TOKENIZER = AutoTokenizer.from_pretrained(BASE)


def texts_of(program, examples):
    return NaturalTexts(program, {"first", "last"}, examples, TOKENIZER)


def test_before_any_rollout_the_first_examples_prompts_are_rendered_by_the_adapter():
    examples = [dspy.Example(numbers=f"{n} 2 3 4").with_inputs("numbers") for n in range(3)]
    ids = texts_of(relay(), examples).ids()
    assert len(ids) == 6  # both predictors read what the examples hold
    messages = dspy.ChatAdapter().format(relay().first.signature, [], {"numbers": "0 2 3 4"})
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == expected[:TEXT_TOKENS]


def test_where_no_prompt_can_be_rendered_plain_sentences_stand_in():
    ids = texts_of(relay(), [dspy.Example(other="1").with_inputs("other")]).ids()
    assert ids == [TOKENIZER(text, add_special_tokens=False)["input_ids"][:TEXT_TOKENS] for text in LAST_RESORT]


def test_the_first_calls_that_are_played_stay_the_texts():
    texts = texts_of(relay(), [])
    calls = tuple(Call("first", (n, 1, 2), (7,) * (n + 1), (-1.0,) * (n + 1), "stop", "v") for n in range(200))
    texts.see([Rollout(0, Candidate({}), calls[100:], 1.0)])
    texts.see([Rollout(0, Candidate({}), calls[:5], 1.0)])
    assert texts.ids() == [[n, 1, 2, *(7,) * (n + 1)][:TEXT_TOKENS] for n in range(100, 100 + TEXTS)]


def test_the_laboratory_s_prompts_are_rendered_with_its_own_template():
    lab = build(train=4, val=1, test=1)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))
    names = [name for name, _ in lab.program.named_predictors()]
    trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-4), device="cpu")
    ids = NaturalTexts(lab.program, names, lab.trainset, trainer.tokenizer).ids()
    shown = lab.trainset[0].inputs().toDict()
    assert ids
    assert all(str(value).lower() in trainer.tokenizer.decode(ids[0]) for value in shown.values())
