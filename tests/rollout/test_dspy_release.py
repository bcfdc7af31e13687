"""DSPy 3.5's defaults, set explicitly under the release that is installed: nothing hangs on what it changes."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest
from dspy.lm15 import Message

import dspy_fst
from dspy_fst.policy_lm import policy_of
from dspy_fst.preflight.data_checks import _required_fields
from dspy_fst.rollout import dspy_release
from dspy_fst.rollout.chat_adapters import adapter_in_force, describe
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.dspy_release import agents, default_adapter, in_words, tells_its_tools
from dspy_fst.rollout.parse_failures import form_asked_for
from dspy_fst.run.directory import read_events
from tests.test_compile import compile_relay

PACKAGE = Path(dspy_fst.__file__).parent
NATIVE_XML = {"name": "XMLAdapter", "use_native_function_calling": True}


def look_up(query: str) -> str:
    """Looks things up."""
    return query


def found(adapter):
    record = describe(adapter)
    return {"name": record.name, "use_native_function_calling": record.settings["use_native_function_calling"]}


def test_the_default_adapter_is_the_release_s(monkeypatch):
    assert type(default_adapter()) is dspy.ChatAdapter
    for release in ("3.5.0", "3.5.0rc1", "3.6"):
        monkeypatch.setattr(dspy_release.dspy, "__version__", release)
        assert found(default_adapter()) == found(adapter_in_force()) == NATIVE_XML
        assert "<answer>" in form_asked_for(dspy.Predict("question -> answer"))


def test_of_two_agents_the_older_one_tells_its_tools_in_its_instruction(monkeypatch):
    old, new = (kind("question -> answer", tools=[look_up]) for kind in (dspy.ReAct, dspy.ReActV2))
    assert agents() == (dspy.ReAct, dspy.ReActV2)
    assert (tells_its_tools(old), tells_its_tools(new)) == (True, False)
    before = read_texts(new, tools=True).texts
    assert any("tools['look_up']" in name for name in before)
    monkeypatch.setattr(dspy, "ReAct", dspy.ReActV2)
    monkeypatch.delattr(dspy, "ReActV2")
    assert agents() == (type(new),)
    assert not tells_its_tools(new)
    assert read_texts(new, tools=True).texts == before
    assert _required_fields(new) == ["question"]


def test_a_prompt_of_objects_is_read_like_one_of_dicts():
    as_dicts = [{"role": "system", "content": "Say it."}, {"role": "user", "content": "now"}]
    as_objects = [SimpleNamespace(**message) for message in as_dicts]
    assert in_words(as_dicts) == in_words(as_objects) == "system: Say it.\nuser: now"
    assert in_words([Message.user("now")]) == "user: now"


WITHOUT = """
import sys
sys.modules["litellm"] = None
import dspy_fst
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.cli.proposer_checks import _missing_keys
import dspy
assert _missing_keys("openai/gpt-5", dspy.LM("openai/gpt-5")) == ()
print("fine")
"""


@pytest.mark.slow
def test_the_package_imports_and_checks_without_litellm():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "fine", done.stderr


def test_no_other_module_names_what_changes():
    changes = re.compile(r"dspy\.ReAct|or dspy\.ChatAdapter\(\)|^\s*import litellm", re.MULTILINE)
    naming = {path.name for path in PACKAGE.rglob("*.py") if changes.search(_code(path))}
    assert naming == {"dspy_release.py"}


def _code(path: Path) -> str:
    """Its lines without strings of several lines, comments and messages."""
    text = re.sub(r'"""[\s\S]*?"""', "", path.read_text())
    return re.sub(r'"[^"\n]*"|#.*', "", text)


@pytest.mark.slow
def test_a_run_under_the_next_release_s_defaults_learns_saves_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(dspy_release.dspy, "__version__", "3.5.0")
    small = {"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 4, "anchors": 2, "search_rollouts": 4}
    compiled = compile_relay(tmp_path / "run", **small)
    (plan,) = [event for event in read_events(tmp_path / "run") if event["event"] == "plan"]
    step = next(event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step")
    assert step["counts"]["rollouts"] == 16
    assert found(compiled._fst_adapter.adapter) == NATIVE_XML
    assert plan["program"] == "Relay"
    policy_of(compiled).release()
