"""What both sides score after a publish is the run's own text: prompts of the first examples, then what was played."""

import dspy

from dspy_fst.publishing import LAST_RESORT, TEXT_TOKENS, TEXTS, NaturalTexts
from dspy_fst.slow.trainer import Trainer, TrainerSettings
from dspy_fst.types import Call, Candidate, Rollout
from programs.lab import BASE, build
from tests.relay import Relay


class Words:
    """A tokenizer whose ids are the words' lengths."""

    def apply_chat_template(self, messages, **options):
        return {"input_ids": [len(word) for message in messages for word in message["content"].split()]}

    def __call__(self, text, **options):
        return {"input_ids": [len(word) for word in text.split()]}


def texts_of(program, examples):
    return NaturalTexts(program, {"first", "last"}, examples, Words())


def test_before_any_rollout_the_first_examples_prompts_are_rendered_by_the_adapter():
    examples = [dspy.Example(numbers=f"{n} 2 3 4").with_inputs("numbers") for n in range(3)]
    ids = texts_of(Relay(), examples).ids()
    assert len(ids) == 6  # both predictors read what the examples hold
    expected = dspy.ChatAdapter().format(Relay().first.signature, [], {"numbers": "0 2 3 4"})
    assert ids[0] == Words().apply_chat_template(expected)["input_ids"][:TEXT_TOKENS]


def test_where_no_prompt_can_be_rendered_plain_sentences_stand_in():
    ids = texts_of(Relay(), [dspy.Example(other="1").with_inputs("other")]).ids()
    assert ids == [[len(word) for word in text.split()] for text in LAST_RESORT]


def test_the_first_calls_that_are_played_stay_the_texts():
    texts = texts_of(Relay(), [])
    calls = tuple(Call("first", (n, 1, 2), (7,) * (n + 1), (-1.0,) * (n + 1), "stop", "v") for n in range(200))
    texts.see([Rollout(0, Candidate({}), calls[100:], 1.0)])
    texts.see([Rollout(0, Candidate({}), calls[:5], 1.0)])
    assert texts.ids() == [[n, 1, 2, *(7,) * (n + 1)][:TEXT_TOKENS] for n in range(100, 100 + TEXTS)]


def test_the_laboratory_s_prompts_are_rendered_with_its_own_template():
    lab = build(train=4, val=1, test=1)
    names = [name for name, _ in lab.program.named_predictors()]
    trainer = Trainer(BASE, TrainerSettings(learning_rate=1e-4), device="cpu")
    ids = NaturalTexts(lab.program, names, lab.trainset, trainer.tokenizer).ids()
    shown = lab.trainset[0].inputs().toDict()
    assert ids
    assert all(str(value).lower() in trainer.tokenizer.decode(ids[0]) for value in shown.values())
