"""The command line: project files, `dspy-fst run`, `dspy-fst resume`, and what a signal leaves behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import dspy
import pytest
import yaml
from typer.testing import CliRunner

from dspy_fst import ConfigurationError, PolicyLM
from dspy_fst.cli import app
from dspy_fst.policy_lm import policy_of
from dspy_fst.project.project_file import kept_in, load_project
from dspy_fst.run.directory import read_events
from programs.lab import BASE, build

ROOT = Path(__file__).parent.parent
MODULE = "mine"
SOURCE = """
from programs.lab import build
from tests.relay import Relay, any_answer as metric, relay

LAB = build(train=32, val=4, test=4)
train, val = LAB.trainset, LAB.valset


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] + " Be brief." for name in components_to_update}
"""
SETTINGS = {
    "program": "mine:Relay",
    "metric": "mine:metric",
    "propose": "mine:propose",
    "trainset": "mine:train",
    "valset": "mine:val",
    "model": str(BASE),
    "policy": {"engine": "in_process", "max_tokens": 12, "temperature": 1.5},
    "run_dir": "run",
    "recipe": {
        "cycles": 2,
        "steps_per_cycle": 4,
        "problems_per_step": 6,
        "population_size": 2,
        "group_size": 4,
        "anchors": 4,
        "search_rollouts": 9,
        "learning_rate": 5e-4,
    },
}
STEPS = list(range(8))
WAIT_S = 120


def project_file(tmp_path, source=SOURCE, **changes):
    """A project in tmp_path; a setting changed to None is left out."""
    (tmp_path / f"{MODULE}.py").write_text(source)
    sys.modules.pop(MODULE, None)  # this process may have imported another test's
    settings = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not None}
    path = tmp_path / "project.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def said(*arguments, code):
    """What the command wrote on stderr, once its exit code and an empty stdout are checked."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return result.stderr


def opened(tmp_path, source=SOURCE, **changes):
    return load_project(project_file(tmp_path, source, **changes)).open()


# ---- the file --------------------------------------------------------------------------------------


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    path = project_file(
        tmp_path,
        program="mine",
        metric=None,
        metrc="mine:metric",
        trainset="train.json",
        recipe={"cycle": 2, "learning_rate": "fast", "auto": "huge"},
        policy={"max_token": 3},
    )
    text = said("run", path, code=2)
    for part in (
        "program='mine': write module:attribute",
        "metric: it is missing",
        "metrc: there is no such setting; did you mean 'metric'?",
        "trainset='train.json': write module:attribute, e.g. my_data:train, or name a .jsonl file",
        "recipe.cycle: there is no such setting; did you mean 'cycles'?",
        "recipe.learning_rate='fast'",
        "recipe.auto='huge'",
        "policy.max_token: there is no such setting; did you mean 'max_tokens'?",
    ):
        assert part in text
    assert text.startswith("8 problems found")


FILES = [
    ("program: [", "line 1"),
    ("- a list", "it must hold settings"),
    ("run_dir: one\nrun_dir: two", "'run_dir' is given twice"),
    ("recipe:\n  cycles: 1\n  seed: 2\n  cycles: 3", "'cycles' is given twice"),
    ("folder: nowhere", "folder: there is no folder"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_file_that_cannot_be_read_is_told_with_the_place(tmp_path, content, message):
    (tmp_path / "project.yaml").write_text(content)
    assert message in said("run", tmp_path / "project.yaml", code=2)


def test_a_file_that_is_not_there_is_a_plain_error(tmp_path):
    text = said("run", tmp_path / "none.yaml", code=2)
    assert "none.yaml cannot be read" in text
    assert "Traceback" not in text


def test_a_secret_in_the_file_is_refused_and_never_shown(tmp_path):
    path = project_file(
        tmp_path,
        reflection_lm={"model": "openai/gpt-5", "api_key": "sk-1", "extra_headers": {"Authorization": "sk-2"}},
        policy={"engine_options": {"api_key": "sk-3"}},
        api_key="sk-4",
    )
    text = said("run", path, code=2)
    for name in ("reflection_lm.api_key", "reflection_lm.extra_headers.Authorization", "policy.engine_options.api_key"):
        assert f"{name}: a secret does not belong in this file" in text
    wrong_place = project_file(tmp_path, reflection_lm={"model": "openai/gpt-5", "api_key_env": "sk-5"})
    text += said("run", wrong_place, code=2)
    assert "write the name of an environment variable" in text
    assert "sk-" not in text


SECRETS = {
    "azure_ad_token": "abc",
    "hf_token": "abc",
    "aws_web_identity_token": "abc",
    "vertex_credentials": {"project": "abc"},
    "azure_password": "abc",
    "extra_headers": {"Cookie": "sess=abc", "Helicone-Auth": "abc", "X-API-Key": "abc"},
    "api_base": "https://user:abc@host/v1",
    "organization": "hf_" + "abc0" * 9,
}


def test_what_is_named_like_a_secret_or_looks_like_one_is_refused_and_never_shown(tmp_path):
    lm = {"model": "azure/gpt-5", **SECRETS}
    address = SECRETS["api_base"]
    text = said("run", project_file(tmp_path, propose=None, reflection_lm=lm, metric=address), code=2)
    names = {*SECRETS, *(f"extra_headers.{name}" for name in SECRETS["extra_headers"])} - {"extra_headers"}
    for name in ("metric", *(f"reflection_lm.{name}" for name in names)):
        assert f"{name}: a secret does not belong in this file" in text
    assert "abc" not in text


def test_what_only_sounds_like_a_secret_is_allowed(tmp_path):
    lm = {"model": "openai/gpt-5", "max_tokens": 9, "max_completion_tokens": 9, "api_base": "http://host:80/v1"}
    more = {"api_key_env": "MY_KEY", "prompt_cache_key": "mine", "input_cost_per_token": 0.1}
    project = load_project(project_file(tmp_path, propose=None, reflection_lm={**lm, **more}))
    assert project.reflection_lm.model_dump(exclude_unset=True) == {**lm, **more}


# ---- what the file names ---------------------------------------------------------------------------


def test_a_module_that_does_not_import_is_told_once_with_reason_and_place(tmp_path):
    path = project_file(tmp_path, "import dspy\n\nimport no_such_module\n", valset="no_data:val")
    text = said("run", path, code=2)
    assert text.startswith("reading the project\n2 problems found")
    assert (
        "program, metric, propose, trainset: module 'mine' does not import: "
        "ModuleNotFoundError: No module named 'no_such_module' (mine.py, line 3)"
    ) in text
    assert f"No module named 'no_data' (looked for in {tmp_path} first)" in text


def test_a_syntax_error_and_a_script_that_exits_are_told_too(tmp_path):
    assert "invalid syntax (mine.py, line 2)" in said("run", project_file(tmp_path, "\nfor\n"), code=2)
    text = said("run", project_file(tmp_path, "import sys\nsys.exit('usage: mine')\n"), code=2)
    assert "SystemExit: usage: mine (mine.py, line 2)" in text


def test_a_missing_attribute_names_close_ones_and_the_rest_is_checked_too(tmp_path):
    source = SOURCE + "\n\ndef broken():\n    return dict()['numbers']\n"
    text = said("run", project_file(tmp_path, source, metric="mine:metrics", trainset="mine:broken"), code=2)
    assert "mine.py has no 'metrics'; did you mean 'metric'?" in text
    assert "trainset: mine:broken() raised: KeyError: 'numbers' (mine.py, line 14)" in text


def test_debug_shows_where_the_user_s_code_raised(tmp_path):
    path = project_file(tmp_path, SOURCE + "\n\ndef broken():\n    return {}['numbers']\n", program="mine:broken")
    assert "Traceback" not in said("run", path, code=2)
    text = said("run", path, "--debug", code=2)
    assert "Traceback" in text
    assert "return {}['numbers']" in text


def test_a_program_that_is_not_one_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match=r"program: mine:train gives list, not a dspy\.Module"):
        opened(tmp_path, program="mine:train")
    with pytest.raises(ConfigurationError, match=r"program: mine:forgets gives NoneType, not a dspy\.Module"):
        opened(tmp_path, SOURCE + "\n\ndef forgets():\n    Relay()\n", program="mine:forgets")


def test_predictors_without_an_lm_speak_with_the_model_and_others_keep_theirs(tmp_path):
    source = (
        SOURCE + "\n\ndef half():\n    program = Relay()\n    program.last.lm = dspy.LM('openai/x')\n    return program"
    )
    made = opened(tmp_path, "import dspy\n" + source, program="mine:half")
    lms = {name: predictor.lm for name, predictor in made.program.named_predictors()}
    assert isinstance(lms["first"], PolicyLM)
    assert (lms["first"].kwargs["temperature"], lms["first"].kwargs["max_tokens"]) == (1.5, 12)
    assert lms["last"].model == "openai/x"


def test_a_program_keeps_the_policy_that_it_holds(tmp_path):
    source = SOURCE + "\nprogram = relay()\nprogram.last.lm = None\n"
    made = opened(tmp_path, source, program="mine:program", model=None, policy=None)
    held = sys.modules[MODULE].program
    assert {id(predictor.lm.handle) for _, predictor in made.program.named_predictors()} == {id(held.first.lm.handle)}
    assert held.last.lm is None, "the user's own program is left as it is"
    with pytest.raises(ConfigurationError) as caught:
        opened(tmp_path, source, program="mine:program", model="other/model")
    assert "model: the program holds a PolicyLM of" in str(caught.value)
    assert "policy: the program holds a PolicyLM with settings of its own" in str(caught.value)


def test_engine_options_may_name_a_file_and_the_variable_of_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-1")
    options = {"attach_url": "http://127.0.0.1:9", "api_key_env": "MY_KEY", "log_path": "server.log"}
    made = opened(tmp_path, policy={"engine": "vllm", "engine_options": options})
    wanted = {"attach_url": "http://127.0.0.1:9", "api_key": "sk-1", "log_path": tmp_path / "server.log"}
    assert policy_of(made.program).handle.options == wanted


def test_without_a_model_and_a_policy_there_is_nothing_to_train(tmp_path):
    with pytest.raises(ConfigurationError, match="model: it is missing"):
        opened(tmp_path, model=None)
    with pytest.raises(ConfigurationError, match="policy: engine_options of engine='in_process'"):
        opened(tmp_path, policy={"engine": "in_process", "engine_options": {"speed": 9}})


def test_examples_come_from_json_lines(tmp_path):
    lines = [{"numbers": "1 2 3 4", "answer": "4 3 2"}, {"numbers": "5 6 7 8", "answer": "8 7 6"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    made = opened(tmp_path, trainset="train.jsonl", inputs=["numbers"])
    assert [example.toDict() for example in made.trainset] == lines
    assert made.trainset[0].inputs().toDict() == {"numbers": "1 2 3 4"}
    with pytest.raises(ConfigurationError, match=r"train\.jsonl: .*line 1 has no 'number'; did you mean 'numbers'"):
        opened(tmp_path, trainset="train.jsonl", inputs=["number"])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{'numbers'}")
    with pytest.raises(ConfigurationError, match="line 4 is no JSON"):
        opened(tmp_path, trainset="train.jsonl", inputs=["numbers"])
    with pytest.raises(ConfigurationError, match=r"inputs: name the input fields of train\.jsonl"):
        opened(tmp_path, trainset="train.jsonl")
    with pytest.raises(ConfigurationError, match=r"inputs: it belongs to \.jsonl files"):
        opened(tmp_path, inputs=["numbers"])


def test_the_reflection_lm_s_key_comes_from_the_environment(tmp_path, monkeypatch):
    settings = {"model": "openai/gpt-5", "temperature": 1.0, "max_tokens": 20000, "api_key_env": "MY_KEY"}
    with pytest.raises(ConfigurationError, match=r"reflection_lm\.api_key_env: the environment variable MY_KEY"):
        opened(tmp_path, propose=None, reflection_lm=settings)
    monkeypatch.setenv("MY_KEY", "sk-1")
    project = load_project(project_file(tmp_path, propose=None, reflection_lm=settings))
    lm = project.open().optimizer.reflection_lm
    assert (lm.model, lm.kwargs["temperature"], lm.kwargs["api_key"]) == ("openai/gpt-5", 1.0, "sk-1")
    assert "api_key_env" not in lm.kwargs
    project.run_path.mkdir()
    assert "sk-1" not in project.keep().read_text()


def test_a_reflection_lm_may_be_its_name_alone(tmp_path):
    made = opened(tmp_path, propose=None, reflection_lm="openai/gpt-4o")
    assert isinstance(made.optimizer.reflection_lm, dspy.LM)
    assert made.optimizer.reflection_lm.model == "openai/gpt-4o"


def test_the_kept_settings_are_the_same_project_wherever_they_are_read(tmp_path, monkeypatch):
    project = load_project(project_file(tmp_path, policy={"max_tokens": 9}, recipe={"auto": "light", "seed": 3}))
    project.run_path.mkdir()
    monkeypatch.chdir("/")
    kept = load_project(project.keep())
    assert kept == project
    assert kept.run_path == tmp_path / "run"
    assert kept.open().optimizer.recipe == {"seed": 3, "auto": "light"}


def test_the_laboratory_s_project_is_whole():
    made = load_project(ROOT / "programs" / "lab" / "project.yaml").open()
    assert policy_of(made.program).checkpoint.path == BASE
    assert made.trainset == build().trainset
    assert made.optimizer.run_dir == ROOT / "runs" / "lab"


# ---- commands --------------------------------------------------------------------------------------


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    path = project_file(tmp_path, trainset="mine:val")
    assert "4 examples are fewer than problems_per_step=6" in said("run", path, code=2)
    assert not (tmp_path / "run").exists()
    path = project_file(tmp_path, SOURCE + "\n\ndef raising(gold, pred):\n    raise OSError", metric="mine:raising")
    assert "cannot be measured" in said("run", path, code=2)  # found after the directory was taken
    assert [entry.name for entry in (tmp_path / "run").iterdir()] in ([], [".lock"])


def test_resume_says_how_to_go_on_without_a_project(tmp_path):
    assert "not the directory of a run" in said("resume", tmp_path / "none", code=2)
    (tmp_path / "recipe.json").write_text("{}")
    assert "nothing was saved there yet; start it again" in said("resume", tmp_path, code=2)
    (tmp_path / "states" / "000000").mkdir(parents=True)
    text = said("resume", tmp_path, code=2)
    assert "it keeps no project.yaml, Python made it). Give --project FILE, or --program MODULE:ATTRIBUTE, the" in text
    for flag in ("--metric", "--trainset", "--reflection-lm NAME or --propose"):
        assert flag in text


FOREIGN = [
    (None, "folder=None is not the absolute path"),
    ("../code", "folder='../code' is not the absolute path"),
    ("{root}/link", "/link' is not the absolute path"),  # leads wherever its owner wants
    ("{root}/run", "mine:Relay would be looked for in"),
    ("{root}/run/code", "mine:Relay would be looked for in"),
]


@pytest.mark.parametrize(("folder", "message"), FOREIGN)
@pytest.mark.parametrize("command", ["resume", "eval", "serve"])
def test_no_code_is_run_from_a_run_directory(tmp_path, monkeypatch, command, folder, message):
    run_dir = tmp_path / "run"
    for place in (run_dir / "code", run_dir / "compiled", tmp_path / "code"):
        place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "code")
    (run_dir / "recipe.json").write_text("{}")
    folder = folder and folder.format(root=tmp_path)
    project_file(run_dir, folder=folder)
    for place in (run_dir, run_dir / "code", tmp_path / "code"):
        (place / f"{MODULE}.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.chdir(run_dir)
    for named in (run_dir, "."):
        text = said(command, named, code=2)
        assert f"{run_dir / 'project.yaml'}: " in text
        assert message in text
        assert "name your own project file: dspy-fst run FILE" in text
    assert not (tmp_path / "ran").exists()
    assert MODULE not in sys.modules


def test_the_code_of_a_run_may_lie_around_its_directory(tmp_path):
    project = load_project(project_file(tmp_path))
    project.run_path.mkdir()
    project.keep()
    assert kept_in(tmp_path / "run") == project
    (tmp_path / "run").rename(tmp_path / "moved")
    assert kept_in(tmp_path / "moved").folder == tmp_path


def test_a_run_that_stops_says_how_to_go_on(tmp_path):
    source = SOURCE + (
        "\n\nCALLS = []\n\n\ndef fails_later(gold, pred):\n    CALLS.append(gold)\n    if len(CALLS) > 40:\n"
        "        raise OSError('the judge is down')\n    return 1.0 / max(len(pred.answer), 1)\n"
    )
    path = project_file(tmp_path, source, metric="mine:fails_later", recipe={**SETTINGS["recipe"], "method": "rl"})
    text = said("run", path, code=1)
    assert "rollouts measured nothing" in text
    assert f"The run can be continued: dspy-fst resume {tmp_path / 'run'}" in text
    assert "Traceback" not in text


def test_sigterm_while_the_project_is_imported_is_no_fault_of_it(tmp_path):
    path = project_file(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    words = said("run", path, code=143)
    assert words.endswith("stopped by SIGTERM\nNothing was saved yet; the same command starts it again\n")


def test_help_and_version_come_without_torch_and_dspy():
    check = (
        "import sys; from typer.testing import CliRunner; from dspy_fst.cli import app\n"
        "for option in ('--help', '--version'):\n"
        "    result = CliRunner().invoke(app, [option]); assert result.exit_code == 0; print(result.stdout)\n"
        "assert not {'torch', 'dspy', 'transformers'} & {*sys.modules}, 'a heavy module was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout
    assert "dspy-fst 0" in done.stdout


# ---- a real run, interrupted -----------------------------------------------------------------------


def command(*arguments):
    words = [sys.executable, "-m", "dspy_fst.cli", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(run_dir):
    return [event["report"]["step"] for event in read_events(run_dir) if event["event"] == "step"]


def interrupted(process, number, run_dir, steps):
    """The process's exit code and stderr after it got the signal when its events told of so many steps."""
    deadline = time.monotonic() + WAIT_S
    try:
        while len(steps_of(run_dir)) < steps:
            assert process.poll() is None, f"the run ended before step {steps}: {process.communicate()[1]}"
            assert time.monotonic() < deadline, f"the test waited {WAIT_S} s for {steps} steps of the run"
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    return process.returncode, errors


def test_a_run_survives_sigterm_and_ctrl_c_and_ends_with_every_step_once(tmp_path):
    path, run_dir = project_file(tmp_path), tmp_path / "run"

    code, errors = interrupted(command("run", path), signal.SIGTERM, run_dir, steps=1)
    assert code == 143, errors
    assert f"The run can be continued: dspy-fst resume {run_dir}" in errors
    assert "Traceback" not in errors
    assert len(steps_of(run_dir)) < len(STEPS)

    code, errors = interrupted(command("resume", run_dir), signal.SIGINT, run_dir, steps=5)
    assert code == 130, errors
    assert "stopped by Ctrl-C" in errors
    assert "Traceback" not in errors
    assert len(steps_of(run_dir)) < len(STEPS)

    done = CliRunner().invoke(app, ["resume", str(run_dir), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert steps_of(run_dir) == STEPS
    assert outcome["steps"] == len(STEPS)
    assert outcome["run_dir"] == str(run_dir)
    assert (Path(outcome["weights"]) / "model.safetensors").is_file()
    assert len(outcome["population"]) == 2
    assert outcome["population"][0]["score"] == max(outcome["validation"].values())
    assert set(outcome["population"][0]["texts"]) == {"first", "last"}
    assert (Path(outcome["compiled"]) / "policy.json").is_file()
    assert "step 7: reward" in done.stderr, "progress goes to stderr"

    events, kept = (run_dir / "events.jsonl").read_bytes(), (run_dir / "project.yaml").read_bytes()
    again = CliRunner().invoke(app, ["resume", str(run_dir), "--json"], catch_exceptions=False)
    assert again.exit_code == 0
    assert "is finished" in again.stderr
    assert json.loads(again.stdout) == outcome
    project_file(tmp_path, recipe={**SETTINGS["recipe"], "learning_rate": 1e-3})
    assert "holds a run of another configuration: learning_rate" in said("run", path, code=2)
    assert (run_dir / "events.jsonl").read_bytes() == events
    assert (run_dir / "project.yaml").read_bytes() == kept
