"""Demos in a run: what a whole compile() leaves, shows and counts; and what is told before work."""

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_fst
from dspy_fst import ConfigurationError, FSTOptimizer, PolicyLM
from dspy_fst.config import FSTConfig, make_config
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.formatting.demo_texts import readable
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.policy_lm import policy_of
from dspy_fst.preflight.demo_checks import demo_faults, demo_warnings
from dspy_fst.preflight.model_checks import context_faults, with_demo_tokens
from dspy_fst.report.diff import Piece, text_diff
from dspy_fst.report.from_directory import read_record
from dspy_fst.report.page import cost_rows, render
from dspy_fst.report.summary import summary_of
from dspy_fst.rollout.components import carry, demos_in, demos_of, marked, read_texts, written_demos
from dspy_fst.run.files import to_jsonable
from dspy_fst.training.request import Arguments, Proposers, check
from dspy_fst.types import Call, Candidate, Population, Rollout
from programs.lab import BASE, build
from tests.test_compile import propose

DEMOS = {"max_bootstrapped_demos": 2, "max_labeled_demos": 1, "max_demo_tokens": 120, "metric_threshold": 0.5}
SMALL = {
    **{"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 8, "population_size": 2, "group_size": 4},
    **{"search_rollouts": 60, "progress": False, "reflection_minibatch": 4, "seed": 1},
}


def compiled_in(run_dir: Path, **settings: Any) -> tuple[dspy.Module, dspy.Module]:
    """The student and what a run makes of it. It carries a candidate with a demo: this base was taught without any, so
    no search keeps one that it draws."""
    lab = build("reverse", train=16, val=4, test=4)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))
    seed = read_texts(lab.program, demos=True)
    example = lab.trainset[0]
    demo = {"augmented": True, "numbers": example.numbers, "answer": "1 2"}
    other = Candidate({**seed.texts, demos_of("solve"): written_demos([marked(demo, example)])})
    carry(lab.program, Population((seed, other), (None, None)))
    optimizer = FSTOptimizer(metric=lab.metric, propose=propose, run_dir=run_dir, **{**SMALL, **DEMOS, **settings})
    return lab.program, optimizer.compile(lab.program, trainset=lab.trainset)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dspy.Module, dspy.Module]:
    path = tmp_path_factory.mktemp("demos") / "run"
    student, program = compiled_in(path)
    return path, student, program


def shown(program: dspy.Module) -> list[tuple[str, list[dict[str, Any]]]]:
    """(component, its demos) of every member of the population."""
    texts = [item for member in program.population.members for item in member.texts.items()]
    return [(name, demos_in(text)) for name, text in texts if name.endswith(".demos[*]")]


@pytest.mark.slow
def test_a_population_holds_demos_within_their_bounds(run: tuple[Path, dspy.Module, dspy.Module]) -> None:
    path, student, program = run
    (name,) = {name for name, _ in shown(program)}
    tried = [node.texts[name] for node in read_record(path, "run").nodes]
    assert any(tried)
    assert max(len(demos_in(text)) for text in tried) <= 3
    assert not student.named_predictors()[0][1].demos
    best = program.population.best.texts[name]
    assert written_demos(program.named_predictors()[0][1].demos) == best


@pytest.mark.slow
def test_show_and_the_page_tell_demos_as_whole_lines_and_their_cost(
    run: tuple[Path, dspy.Module, dspy.Module],
) -> None:
    record = read_record(run[0], "run")
    assert record.costs.demo_proposals > 0
    told = str(summary_of(record))
    page = render([record])
    assert "Proposals of demos" in page
    assert ("proposals accepted for other demos", [str(record.costs.demos_accepted)]) in cost_rows([record])
    assert "bootstrapped: numbers=" in page
    assert "_fst_problem" not in page + told


@pytest.mark.slow
def test_a_compiled_program_keeps_its_demos_when_it_is_saved_and_goes_on(
    run: tuple[Path, dspy.Module, dspy.Module], tmp_path: Path
) -> None:
    _, _, program = run
    loaded = dspy_fst.load(dspy_fst.save(program, tmp_path / "out"), build("reverse").program)
    assert loaded.population == program.population
    assert own_texts(loaded, FSTConfig(max_bootstrapped_demos=1)) == program.population.best
    policy_of(loaded).release()


# ---- before work -----------------------------------------------------------------------------------


class Asks(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
        self.judge = dspy.ChainOfThought("answer -> verdict")


TRAINSET = [dspy.Example(question=f"q{i}", answer="a").with_inputs("question") for i in range(6)]


def faults(student: dspy.Module | None = None, trainset: Any = TRAINSET, **settings: Any) -> list[str]:
    config, wrong = make_config({"anchors": 8, **settings})
    assert not wrong
    return list(demo_faults(config, student or Asks(), trainset))


def test_what_demos_cannot_be_made_of_is_refused_with_what_to_do() -> None:
    assert faults(max_labeled_demos=5, max_bootstrapped_demos=7) == []
    (few,) = faults(max_labeled_demos=6)
    assert "max_labeled_demos=6: 6 different examples of the trainset hold all inputs and an output" in few
    assert "lower it, add examples, or use max_bootstrapped_demos" in few
    elsewhere = [dspy.Example(question="q", label="a").with_inputs("question")] * 9
    (unlabeled,) = faults(trainset=elsewhere, max_labeled_demos=1)
    assert "the first example holds question, label); name the labels as the predictor's outputs" in unlabeled
    (anchors,) = faults(max_bootstrapped_demos=8)
    assert "a rollout shows no demo of its own problem; use at most 7" in anchors
    (opaque,) = faults(trainset=[dspy.Example(question=object()).with_inputs("question")], max_bootstrapped_demos=1)
    assert "trainset: example 0 cannot be written as JSON" in opaque
    student = Asks()
    student.ask.demos = [dspy.Example(question=object(), answer="a")]
    (own,) = faults(student, max_bootstrapped_demos=1)
    assert "student: ask shows a demo that cannot be kept beside those that evolve" in own
    assert faults(student) == []


def test_copies_of_an_example_are_one_label() -> None:
    (few,) = faults(trainset=TRAINSET[:1] * 9, max_labeled_demos=1)
    assert "max_labeled_demos=1: 1 different examples" in few


def test_what_does_nothing_is_told() -> None:
    def told(**settings: Any) -> list[str]:
        return list(demo_warnings(FSTConfig(**settings), Asks(), TRAINSET))

    assert told() == told(max_bootstrapped_demos=4) == []
    (labels,) = told(max_labeled_demos=2)
    assert "'judge.predict', which get no demos; max_bootstrapped_demos=4" in labels
    (threshold,) = told(metric_threshold=0.5)
    assert "metric_threshold=0.5 does nothing without demos" in threshold
    (never,) = told(method="rl", max_bootstrapped_demos=2)
    assert "do nothing under method='rl'" in never


def test_distilling_a_population_that_differs_in_demos_is_refused() -> None:
    config, (told,) = make_config(
        {"seed_kl_teacher": "population", "seed_kl_coefficient": 0.1, "max_bootstrapped_demos": 1}
    )
    assert config is None
    assert "leave the demos out, or use seed_kl_teacher='seed'" in told


def test_demos_that_leave_no_room_in_the_context_are_refused() -> None:
    policy = PolicyLM(BASE, engine="in_process", max_tokens=24)
    call = Call("ask", tuple(range(600)), (1,), (-0.1,), "stop", "step-000000")
    rollout = Rollout(0, Candidate({"ask": ""}), (call,), 1.0, Outcome("scored"))
    assert context_faults(policy, [rollout], 400) == []
    (told,) = context_faults(policy, [rollout], 401)
    assert "max_demo_tokens=401: a prompt of the first examples has 600 tokens" in told
    assert "use max_demo_tokens=400 or fewer" in told


@pytest.mark.parametrize(
    ("room", "tokens"),
    [({}, 250), ({"max_model_len": 424}, 100), ({"max_model_len": 25}, 1), ({"max_model_len": 9000}, 1000)],
)
def test_by_default_demos_take_a_share_of_the_context(room: dict[str, int], tokens: int, tmp_path: Path) -> None:
    policy = PolicyLM(BASE, engine="vllm" if room else "in_process", max_tokens=24, engine_options=room)
    assert with_demo_tokens(FSTConfig(max_labeled_demos=1), policy, tmp_path).demo_tokens == tokens
    assert with_demo_tokens(FSTConfig(max_labeled_demos=1, max_demo_tokens=7), policy, tmp_path).demo_tokens == 7
    assert with_demo_tokens(FSTConfig(), policy, tmp_path) == FSTConfig()


def test_a_run_of_an_earlier_release_goes_on_with_its_number(tmp_path: Path) -> None:
    """It began with 1000 tokens on every model, and recorded them also where no demos evolved."""
    path = tmp_path / "run"
    lab = build("reverse", train=16, val=4, test=4)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))

    def recipe(**settings: Any) -> dict[str, Any]:
        given = Arguments(
            lab.program, lab.trainset, lab.metric, proposers=Proposers(propose=propose), run_dir=path,
            settings={"problems_per_step": 8, **settings},
        )  # fmt: skip
        return dict(check(given).identity)

    path.mkdir()
    (path / "recipe.json").write_text(json.dumps(to_jsonable({**recipe(), "max_demo_tokens": 1000})))
    assert "max_demo_tokens" not in recipe()
    (path / "recipe.json").unlink()
    recorded = recipe(max_labeled_demos=2)
    assert recorded["max_demo_tokens"] == (1024 - 16) // 4
    (path / "recipe.json").write_text(json.dumps(to_jsonable(recorded)))
    assert recipe(max_labeled_demos=2) == recorded
    (path / "recipe.json").write_text(json.dumps(to_jsonable({**recorded, "max_demo_tokens": 1000})))
    assert recipe(max_labeled_demos=2) == {**recorded, "max_demo_tokens": 1000}
    (path / "recipe.json").write_text(json.dumps(to_jsonable(recorded)))
    with pytest.raises(ConfigurationError, match=r"max_demo_tokens .there 252, now 300\.?"):
        recipe(max_labeled_demos=2, max_demo_tokens=300)


# ---- for readers -----------------------------------------------------------------------------------


def test_demos_are_read_one_a_line_and_compared_as_wholes() -> None:
    name = demos_of("ask")
    kept = '{"question": "6 * 7", "answer": "42"}'
    before = f'{kept}\n{{"augmented": true, "question": "a\\nb", "answer": "1", "_fst_problem": "0"}}'
    after = f'{kept}\n{{"question": "c b", "answer": [1], "_fst_problem": "1"}}'
    assert readable(name, after) == "the user's: question=6 * 7, answer=42\nlabeled: question=c b, answer=[1]"
    assert text_diff(name, before, after) == [
        Piece("gone", "bootstrapped: question=a / b, answer=1\n"),
        Piece("same", "the user's: question=6 * 7, answer=42\n"),
        Piece("new", "labeled: question=c b, answer=[1]\n"),
    ]
    assert readable("ask", kept) == kept
    assert [piece.kind for piece in text_diff("ask", "Say it.", "Say that.")] == ["same", "gone", "new"]
