"""The adapter is part of a run, of the saved program and of whatever serves it."""

import copy
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import cloudpickle
import dspy
import pytest
import yaml
from dspy.adapters.baml_adapter import BAMLAdapter
from dspy.adapters.types.citation import Citations
from dspy.utils.exceptions import AdapterParseError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import dspy_fst
from dspy_fst import FSTOptimizer
from dspy_fst.cli import app
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.evaluation.run_reader import RunReader
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.chat_adapters import (
    NATIVE_TYPES,
    AdapterSettings,
    SavedAdapter,
    code_of,
    describe,
    identity,
    keep,
    make_adapter,
    recorded,
)
from dspy_fst.run.directory import read_events
from dspy_fst.saving.export import export
from dspy_fst.saving.manifest import seal
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import ServeSettings
from programs.lab import BASE, build
from tests.pipelines.watched import lab_policy, says
from tests.relay import Relay, any_answer, relay
from tests.serve.makers import KEY, ask

RECIPE = {
    "cycles": 1,
    "steps_per_cycle": 1,
    "problems_per_step": 2,
    "population_size": 1,
    "group_size": 2,
    "anchors": 2,
    "search_rollouts": 3,
    "progress": False,
    "parse_trial": 0,
}
JSON_FORM, CHAT_FORM = "Respond with a JSON object", "[[ ## completed ## ]]"


STOPPED: list[str] = []
"""Anything in it stops whoever proposes, as a signal would."""


def propose(candidate, reflective_dataset, components_to_update):
    if STOPPED:
        raise KeyboardInterrupt
    return {name: candidate[name] + " Be brief." for name in components_to_update}


def compile_relay(run_dir, program=None, **changes):
    lab = build(train=8, val=2, test=2)
    optimizer = FSTOptimizer(metric=any_answer, propose=propose, run_dir=run_dir, **{**RECIPE, **changes})
    return optimizer.compile(program or relay(), trainset=lab.trainset)


class Prompts(dspy.utils.BaseCallback):
    """What every LM is asked, as one text a call."""

    def __init__(self):
        self.seen = []

    def on_lm_start(self, call_id, instance, inputs):
        self.seen.append("\n".join(str(message["content"]) for message in inputs["messages"]))


def asked_by(program, **context):
    """The prompts of one call of the program."""
    prompts = Prompts()
    with dspy.context(callbacks=[prompts], **context), suppress(AdapterParseError):
        program(numbers="3 1 2")
    return prompts.seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Compiled under JSONAdapter, and saved."""
    folder = tmp_path_factory.mktemp("json")
    prompts = Prompts()
    with dspy.context(adapter=dspy.JSONAdapter(), callbacks=[prompts]):
        compiled = compile_relay(folder / "run")
    saved = dspy_fst.save(compiled, folder / "saved")
    yield compiled, saved, folder / "run", prompts.seen
    policy_of(compiled).release()


IN_A_FRESH_PROCESS = """
import sys, json
from tests.cases.test_adapters import asked_by
from tests.pipelines.watched import lab_policy, says
from tests.relay import Relay
import dspy_fst
loaded = dspy_fst.load(sys.argv[1], Relay())
print(json.dumps(asked_by(loaded)))
"""


def test_loaded_in_a_fresh_process_it_asks_as_the_run_asked(trained):
    compiled, saved, _, during = trained
    assert all(JSON_FORM in prompt for prompt in during)
    ran = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, str(saved)], capture_output=True, text=True, timeout=300, check=True
    )
    prompts = json.loads(ran.stdout.splitlines()[-1])
    assert prompts == asked_by(compiled, adapter=dspy.JSONAdapter())[: len(prompts)]
    assert prompts
    assert all(JSON_FORM in prompt and CHAT_FORM not in prompt for prompt in prompts)


def test_the_compiled_program_asks_as_it_was_trained_and_tells_of_another_setting_once(trained, caplog):
    compiled, *_ = trained
    assert JSON_FORM in asked_by(compiled)[0]
    assert "XMLAdapter" not in caplog.text
    for _ in range(2):
        assert JSON_FORM in asked_by(compiled, adapter=dspy.XMLAdapter())[0]
    told = [record.getMessage() for record in caplog.records if "DSPy is set to" in record.getMessage()]
    assert len(told) == 1
    assert "XMLAdapter" in told[0]
    assert "JSONAdapter" in told[0]


@pytest.mark.parametrize(
    "copied",
    [
        lambda program: program.deepcopy(),
        copy.deepcopy,
        lambda program: cloudpickle.loads(cloudpickle.dumps(program)),
        lambda program: program.candidate_programs[0]["program"],
    ],
    ids=["dspy's deepcopy", "deepcopy", "cloudpickle", "a candidate program"],
)
def test_copies_ask_as_it_was_trained(trained, copied):
    twin = copied(trained[0])
    assert isinstance(twin, Relay)
    assert JSON_FORM in asked_by(twin)[0]


def test_dspy_s_own_whole_program_save_keeps_it(trained, tmp_path):
    trained[0].save(tmp_path / "whole", save_program=True)
    assert JSON_FORM in asked_by(dspy.load(tmp_path / "whole", allow_pickle=True))[0]


class Outer(dspy.Module):
    def __init__(self, inner):
        super().__init__()
        self.own, self.inner = dspy.Predict("numbers -> answer"), inner

    def forward(self, numbers):
        with suppress(AdapterParseError):
            self.own(numbers=numbers)
        return self.inner(numbers=numbers)


def test_as_a_part_of_another_program_it_asks_as_it_was_trained_and_the_other_parts_do_not(trained):
    outer = Outer(trained[0])
    outer.own.lm = policy_of(trained[0])
    first, then, *_ = asked_by(outer, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
    assert CHAT_FORM in first
    assert JSON_FORM in then


def test_in_parallel_threads_and_in_tasks_it_asks_as_it_was_trained(trained):
    prompts = Prompts()
    with dspy.context(callbacks=[prompts]):
        dspy.Parallel(num_threads=2, disable_progress_bar=True, max_errors=9)([(trained[0], {"numbers": "1 2"})] * 2)
    assert prompts.seen
    assert all(JSON_FORM in prompt for prompt in prompts.seen)


def test_refine_s_advice_reaches_a_program_that_keeps_its_adapter(trained):
    """dspy.Refine puts an adapter of its own round the one in force for the time of a call."""

    class WrapperAdapter(dspy.ChatAdapter):
        __module__ = dspy.Refine.__module__

        def __call__(self, lm, lm_kwargs, signature, demos, inputs):
            inputs["hint_"] = "count twice"
            signature = signature.append("hint_", dspy.InputField())
            return adapter(lm, lm_kwargs, signature, demos, inputs)

    adapter = before = dspy.ChatAdapter()
    (first, *_) = asked_by(trained[0], adapter=WrapperAdapter())
    assert "count twice" in first
    assert JSON_FORM in first
    assert adapter is before


def test_a_run_is_not_continued_under_another_adapter(trained):
    _, _, run_dir, _ = trained
    with pytest.raises((ConfigurationError, RunDirectoryError)) as refused:
        compile_relay(run_dir)
    assert "adapter" in str(refused.value)
    assert "JSONAdapter" in str(refused.value)
    assert "ChatAdapter" in str(refused.value)


def test_a_run_of_a_release_that_recorded_no_adapter_goes_on(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    monkeypatch.setattr(f"{__name__}.STOPPED", ["now"])
    with dspy.context(adapter=dspy.JSONAdapter()), pytest.raises(KeyboardInterrupt):
        compile_relay(run_dir)
    monkeypatch.undo()
    recipe = json.loads((run_dir / "recipe.json").read_text())
    del recipe["adapter"]
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    assert not [event for event in read_events(run_dir) if event["event"] == "step"]
    prompts = Prompts()
    with dspy.context(adapter=dspy.JSONAdapter(), callbacks=[prompts]):
        compiled = compile_relay(run_dir)
    assert [event for event in read_events(run_dir) if event["event"] == "step"]
    assert prompts.seen
    assert all(JSON_FORM in prompt for prompt in prompts.seen)
    assert JSON_FORM in asked_by(compiled, adapter=dspy.ChatAdapter())[0]
    policy_of(compiled).release()


def test_a_continued_training_goes_on_through_the_adapter_of_the_first(trained, tmp_path):
    prompts = Prompts()
    with dspy.context(callbacks=[prompts]):
        compiled = compile_relay(tmp_path / "run", program=trained[0])
    assert prompts.seen
    assert all(JSON_FORM in prompt for prompt in prompts.seen)
    policy_of(compiled).release()


def test_loaded_with_another_adapter_on_purpose_it_speaks_through_that_and_tells(trained, caplog):
    loaded = dspy_fst.load(trained[1], Relay(), adapter=dspy.XMLAdapter())
    assert "trained through JSONAdapter" in caplog.text
    assert "<answer>" in asked_by(loaded)[0]
    policy_of(loaded).release()


def rewritten(saved: Path, folder: Path, change) -> Path:
    """A copy of a saved program whose policy.json was changed, sealed as its author would."""
    shutil.copytree(saved, folder)
    (folder / "manifest.json").unlink()
    document = json.loads((folder / "policy.json").read_text())
    change(document)
    (folder / "policy.json").write_text(json.dumps(document))
    seal(folder, "0.0.0")
    return folder


def test_a_folder_of_a_release_that_recorded_no_adapter_loads_and_speaks_as_dspy_is_set(trained, tmp_path):
    old = rewritten(trained[1], tmp_path / "old", lambda document: document.pop("adapter"))
    loaded = dspy_fst.load(old, Relay())
    assert CHAT_FORM in asked_by(loaded)[0]
    policy_of(loaded).release()


def test_an_adapter_s_class_is_never_imported_from_a_folder(trained, tmp_path):
    def name_another(document):
        document["adapter"].update(name="antigravity.Adapter", settings={"header": "x"})

    foreign = rewritten(trained[1], tmp_path / "foreign", name_another)
    with pytest.raises(ConfigurationError, match=r"antigravity.Adapter.*adapter="):
        dspy_fst.load(foreign, Relay())
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("settings", [{"callbacks": "x"}, {"use_native_function_calling": "yes"}, {"format": None}])
def test_an_adapter_of_dspy_s_is_given_its_plain_settings_only(trained, tmp_path, settings):
    bad = rewritten(trained[1], tmp_path / "bad", lambda document: document["adapter"].update(settings=settings))
    with pytest.raises(RunDirectoryError, match="adapter"):
        dspy_fst.load(bad, Relay())


class MarkedAdapter(dspy.ChatAdapter):
    """An adapter of a user's own."""

    def __init__(self, mark="M"):
        super().__init__()
        self.mark = mark

    def format(self, signature, demos, inputs):
        first, *rest = super().format(signature, demos, inputs)
        return [{**first, "content": f"{self.mark} {first['content']}"}, *rest]


def changed(adapter, **settings):
    vars(adapter).update(settings)
    return adapter


@pytest.fixture
def marked(trained, tmp_path):
    """Saved by a program that was trained through MarkedAdapter."""
    mark = {"name": f"{__name__}.MarkedAdapter", "settings": {"mark": "M"}, "lms": {}}
    return rewritten(trained[1], tmp_path / "marked", lambda document: document.update(adapter=mark))


def test_an_adapter_of_the_user_s_is_taken_from_him(marked):
    given = dspy_fst.load(marked, Relay(), adapter=MarkedAdapter())
    assert asked_by(given)[0].startswith("M ")
    with dspy.context(adapter=MarkedAdapter()):
        found = dspy_fst.load(marked, Relay())
    assert asked_by(found)[0].startswith("M ")
    for program in (given, found):
        policy_of(program).release()


def configured():
    """A program whose function sets the adapter of its training."""
    dspy.configure(adapter=MarkedAdapter())
    return Relay()


@pytest.mark.usefixtures("dspy_may_be_configured")
def test_a_command_takes_the_user_s_adapter_from_the_function_that_makes_the_program(marked, monkeypatch):
    def evaluated(program):
        named = ["--program", program, "--metric", "tests.relay:any_answer", "--split", "tests.relay_split:examples"]
        arguments = ["eval", marked, *named, "--k", 1, "--json"]
        return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)

    examples = ModuleType("tests.relay_split")
    examples.examples = build(train=1, val=1, test=1).trainset
    prompts = Prompts()
    monkeypatch.setitem(sys.modules, "tests.relay_split", examples)
    refused = evaluated("tests.relay:Relay")
    assert refused.exit_code == 2
    told = " ".join(refused.stderr.split())
    assert "for a command, have the function that --program names call dspy.configure(adapter=...)" in told
    dspy.configure(callbacks=[prompts])  # a context would hide what the function sets
    done = evaluated(f"{__name__}:configured")
    assert done.exit_code == 0, done.output
    assert prompts.seen
    assert all(prompt.startswith("M ") for prompt in prompts.seen)


def test_a_run_s_directory_is_no_saved_program_and_the_message_names_the_one_inside(trained):
    with pytest.raises(RunDirectoryError, match=r"is a run's directory; load its program from .*/run/compiled$"):
        dspy_fst.load(trained[2], Relay())


def test_dspy_s_own_file_holds_no_adapter_and_the_pages_say_so(trained, tmp_path):
    trained[0].save(tmp_path / "program.json")
    loaded = Relay()
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert CHAT_FORM in asked_by(loaded)[0]
    assert JSON_FORM in asked_by(loaded, adapter=dspy.JSONAdapter())[0]
    policy_of(loaded).release()
    for page in ("docs/tutorial.md", "docs/adapters.md"):
        words = " ".join((Path(dspy_fst.__file__).parent.parent / page).read_text().split())
        assert "It holds neither the population nor the adapter" in words or "does not hold it: set it by" in words


def test_an_adapter_of_the_user_s_with_other_settings_is_told(marked, caplog):
    policy_of(dspy_fst.load(marked, Relay(), adapter=MarkedAdapter("other"))).release()
    assert "mark='M'" in caplog.text
    assert "mark='other'" in caplog.text


@pytest.mark.parametrize(
    "adapter",
    [
        dspy.ChatAdapter(use_native_function_calling=True, parallel_tool_calls=True),
        dspy.ChatAdapter(use_json_adapter_fallback=False, native_response_types=[dspy.Reasoning]),
        dspy.JSONAdapter(use_native_function_calling=False),
        dspy.XMLAdapter(),
        BAMLAdapter(),
    ],
    ids=["native calls", "no second call", "JSON without native calls", "XML", "BAML"],
)
def test_an_adapter_of_dspy_s_is_made_again_as_it_was(adapter):
    again = make_adapter(SavedAdapter.model_validate_json(describe(adapter).model_dump_json()), None)
    assert type(again) is type(adapter)
    assert describe(again) == describe(adapter)


@pytest.mark.parametrize(
    "adapter",
    [
        dspy.ChatAdapter(use_native_function_calling=True, parallel_tool_calls=True),
        dspy.ChatAdapter(use_json_adapter_fallback=False, native_response_types=[dspy.Reasoning]),
        dspy.XMLAdapter(native_response_types=[]),
        dspy.JSONAdapter(use_native_function_calling=False),
        BAMLAdapter(parallel_tool_calls=False),
        changed(dspy.JSONAdapter(), use_json_adapter_fallback=False, native_response_types=[Citations]),
    ],
    ids=["native calls", "no second call", "XML", "JSON without native calls", "BAML", "set on it"],
)
def test_the_code_that_is_told_for_an_adapter_makes_it(adapter):
    namespace = {"dspy": dspy}
    exec("\n".join(code_of(describe(adapter))), namespace)
    assert type(namespace["adapter"]) is type(adapter)
    assert describe(namespace["adapter"]) == describe(adapter)


def test_the_code_for_an_adapter_of_the_user_s_names_it_and_is_left_to_him():
    (line,) = code_of(describe(MarkedAdapter("seen")))
    assert line.startswith("adapter = ...")
    assert "MarkedAdapter(" in line
    assert "mark='seen'" in line


def test_what_a_two_step_adapter_extracts_with_is_recorded_and_must_be_given():
    adapter = dspy.TwoStepAdapter(dspy.LM("openai/gpt-x"))
    saved = describe(adapter)
    assert saved.lms == {"extraction_model": "openai/gpt-x"}
    with pytest.raises(ConfigurationError, match="TwoStepAdapter"):
        make_adapter(saved, None)
    with dspy.context(adapter=adapter):
        assert make_adapter(saved, None) is adapter


def test_adapters_that_a_program_holds_itself_are_part_of_a_run():
    program = relay()
    program.adapter = dspy.JSONAdapter()
    plain, held = identity(relay()), identity(program)
    assert plain["name"] == held["name"] == "ChatAdapter"
    assert "JSONAdapter" in str(held)
    assert "JSONAdapter" not in str(plain)


def test_a_served_program_asks_as_it_was_trained(trained):
    asked_by(trained[0])  # whatever released its engine, it is there again
    served = create_app(trained[0], ServeSettings(api_key=KEY, signature="numbers: str -> answer: str"))
    prompts = Prompts()
    with dspy.context(callbacks=[prompts]):
        ask(served, {"inputs": {"numbers": "3 1 2"}})
    assert prompts.seen
    assert all(JSON_FORM in prompt for prompt in prompts.seen)


def test_a_run_that_is_evaluated_asks_as_it_was_trained(trained, tmp_path):
    run_dir = shutil.copytree(trained[2], tmp_path / "run")
    project = {
        "program": "tests.relay:Relay",
        "metric": "tests.relay:any_answer",
        "propose": f"{__name__}:propose",
        "trainset": "relay_examples:examples",
        "valset": "relay_examples:examples",
        "model": str(BASE),
        "policy": {"engine": "in_process", "max_tokens": 12, "temperature": 1.5},
        "run_dir": str(run_dir),
    }
    module = "from programs.lab import build\nexamples = build(train=8, val=2, test=2).trainset\n"
    (tmp_path / "relay_examples.py").write_text(module)
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
    prompts = Prompts()
    arguments = ["eval", run_dir, "--project", tmp_path / "project.yaml", "--k", 1, "--limit", 2, "--json"]
    with dspy.context(callbacks=[prompts]):
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(prompts.seen) >= 2
    assert all(JSON_FORM in prompt and CHAT_FORM not in prompt for prompt in prompts.seen)


def test_an_exported_card_tells_the_adapter(trained, tmp_path):
    card = (export(trained[1], tmp_path / "exported") / "README.md").read_text()
    lines = "\n".join(line for line in card.splitlines() if line.startswith("adapter = "))
    namespace = {"dspy": dspy}
    exec(lines, namespace)
    assert describe(namespace["adapter"]) == describe(dspy.JSONAdapter())
    assert "dspy.configure(adapter=adapter)" in card
    loaded = dspy_fst.load(tmp_path / "exported", Relay())
    assert JSON_FORM in asked_by(loaded)[0]
    policy_of(loaded).release()


class Extracts(dspy.ChatAdapter):
    """An adapter of a user's own that hands the replies to another one."""

    def __init__(self, lm):
        super().__init__()
        self.second = dspy.TwoStepAdapter(lm)


def test_an_adapter_that_asks_a_policy_is_refused_before_any_work(tmp_path):
    program, other = relay(), lab_policy()
    held = relay()
    held.reader = dspy.TwoStepAdapter(policy_of(held))
    cases = [
        (program, dspy.TwoStepAdapter(policy_of(program)), "adapter"),
        (program, dspy.TwoStepAdapter(other), "adapter"),
        (program, Extracts(policy_of(program)), "adapter"),
        (held, dspy.ChatAdapter(), "reader"),
    ]
    for student, adapter, place in cases:
        with dspy.context(adapter=adapter), pytest.raises(ConfigurationError) as refused:
            compile_relay(tmp_path / "run", student)
        assert [*refused.value.faults] == [
            f"{place}: TwoStepAdapter asks a PolicyLM (its extraction_model), which would keep its weights while the "
            "run trains those of the student; give it a frozen LM: extraction_model=dspy.LM(...)"
        ]
        assert not (tmp_path / "run").exists()


def test_a_two_step_adapter_that_asks_a_frozen_lm_trains(tmp_path):
    frozen, student = dspy.utils.DummyLM([{"answer": "1 2"}] * 500), says("Reverse the list.")
    student.set_lm(lab_policy())
    with dspy.context(adapter=dspy.TwoStepAdapter(frozen)):
        compiled = compile_relay(tmp_path / "run", student)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (step,) = [event["report"] for event in events if event["event"] == "step"]
    assert step["counts"]["calls"] == step["counts"]["rollouts"]  # extractions are not among them
    policy_of(compiled).release()


# ---- secrets, and records that somebody else wrote ------------------------------------------------


class Keyed(dspy.ChatAdapter):
    """An adapter of a user's own that asks a service with a key."""

    def __init__(self, mark="M", **secrets):
        super().__init__()
        self.mark, self.max_tokens = mark, 5
        vars(self).update(secrets)


SECRETS = {
    "api_key": "sk-abc",
    "password": "swordfish",
    "service": "sk-proj-A1b2C3d4E5f6G7h8I9j0K1l2M3n4",
    "address": "https://me:hunter2@example.com/",
    "from_environment": "zz-plain-looking-value",
}


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", SECRETS["from_environment"])


def shows_a_secret(text):
    return [value for value in SECRETS.values() if value in text]


def test_an_adapter_s_secrets_are_not_recorded_or_compared(environment):
    keyed, plain = describe(Keyed(**SECRETS)), describe(Keyed())
    assert keyed == plain
    assert keyed.settings["mark"] == "M"
    assert keyed.settings["max_tokens"] == 5
    assert keyed.settings.keys().isdisjoint(SECRETS)
    program = relay()
    program.inner_adapter = Keyed(**SECRETS)
    with dspy.context(adapter=Keyed(**SECRETS)):
        one = identity(program)
    program.inner_adapter = Keyed(**{**SECRETS, "api_key": "another"})
    with dspy.context(adapter=Keyed(**{**SECRETS, "api_key": "another"})):
        assert identity(program) == one
    assert shows_a_secret(str(one)) == []
    assert describe(Keyed("other", **SECRETS)) != keyed


def test_an_adapter_s_secrets_are_not_logged(environment, caplog):
    make_adapter(describe(Keyed(**SECRETS)), Keyed("other", **SECRETS))
    with dspy.context(adapter=Keyed("other", **SECRETS)):
        make_adapter(describe(Keyed(**SECRETS)), None)
    program = relay()
    keep(program, Keyed(**SECRETS))
    with dspy.context(adapter=Keyed("third", **SECRETS)), suppress(AdapterParseError):
        program(numbers="3 1 2")
    policy_of(program).release()
    assert caplog.text.count("mark='other'") == 2
    assert "mark='third'" in caplog.text
    assert shows_a_secret(caplog.text) == []


def test_a_run_through_an_adapter_with_secrets_is_continued_saved_and_loaded(environment, tmp_path):
    with dspy.context(adapter=Keyed(**SECRETS)):
        policy_of(compile_relay(tmp_path / "run")).release()
        compiled = compile_relay(tmp_path / "run")
    saved = dspy_fst.save(compiled, tmp_path / "saved")
    policy_of(compiled).release()
    written = [path.read_text() for path in (*saved.glob("*.json"), *(tmp_path / "run").glob("*.json*"))]
    assert len(written) > 5
    assert [shows_a_secret(text) for text in written if shows_a_secret(text)] == []
    loaded = dspy_fst.load(saved, Relay(), adapter=Keyed(**SECRETS))
    assert loaded.first.lm.checkpoint.path == saved / "weights"


OWN_NAMES = [
    "ChatAdapter",
    "JSONAdapter",
    "XMLAdapter",
    "BAMLAdapter",
    "TwoStepAdapter",
    "x.Mine",
    "a\nb",
    "",
    "x" * 999,
]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.text(max_size=5), max_size=2)
)
SETTING_NAMES = st.sampled_from([*AdapterSettings.model_fields, "callbacks", "format", "__class__", "_fst", "x\ny", ""])
NATIVE = st.lists(st.sampled_from([*NATIVE_TYPES, "Foo"]), max_size=2)
ANYTHING = st.recursive(VALUES, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)
RECORDS = st.fixed_dictionaries(
    {
        "name": st.one_of(st.sampled_from(OWN_NAMES), ANYTHING),
        "settings": st.one_of(st.dictionaries(SETTING_NAMES, st.one_of(VALUES, NATIVE), max_size=3), ANYTHING),
        "lms": st.one_of(
            st.just({}),
            st.dictionaries(st.sampled_from(["extraction_model", "x", ""]), st.text(max_size=5), max_size=2),
            ANYTHING,
        ),
    }
)


@given(RECORDS)
@example({"name": "TwoStepAdapter", "settings": {}, "lms": {}})
@example({"name": "TwoStepAdapter", "settings": {}, "lms": {"x": "openai/gpt-x"}})
@example({"name": "ChatAdapter", "settings": {"native_response_types": None}, "lms": {}})
@settings(max_examples=300, deadline=None)
def test_a_record_that_somebody_wrote_makes_an_adapter_that_works_or_is_refused_in_plain_words(record):
    try:
        saved = recorded(record)
    except ValueError:
        return
    try:
        adapter = make_adapter(saved, None)
    except ConfigurationError:
        return
    assert describe(adapter).name == saved.name
    assert adapter.format(says("Reverse the list.").signature, [], {"numbers": "1 2"})
    assert adapter._call_preprocess(lab_policy(), {}, says("Reverse the list.").signature, {"numbers": "1 2"})


@pytest.mark.parametrize("found", [5, [1], "ChatAdapter", True, {"name": "ChatAdapter"}, {}], ids=str)
def test_a_recipe_s_adapter_that_is_none_is_refused(found, trained, tmp_path):
    with pytest.raises(ValueError, match=r"name|record|adapter"):
        recorded(found)
    run = tmp_path / "run"
    shutil.copytree(trained[2], run)
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "adapter": found}))
    with pytest.raises(RunDirectoryError, match="adapter"):
        _ = RunReader.of(run).adapter


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"name": "TwoStepAdapter", "settings": {}, "lms": {}}, "a TwoStepAdapter has an LM as its extraction_model"),
        ({"name": "x\ny", "settings": {}, "lms": {}}, "is no name of a class"),
        ({"name": "x.Mine", "settings": {"x\ny": 1}, "lms": {}}, "is no name of a class or of a setting"),
        ({"name": "ChatAdapter", "settings": {"native_response_types": None}, "lms": {}}, "not of the right type"),
    ],
)
def test_a_saved_folder_s_adapter_is_checked_before_use(trained, tmp_path, record, match):
    bad = rewritten(trained[1], tmp_path / "bad", lambda document: document.update(adapter=record))
    with pytest.raises(RunDirectoryError, match=match):
        dspy_fst.load(bad, Relay())
