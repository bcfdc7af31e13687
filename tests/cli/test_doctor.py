"""`dspy-fst doctor` on this machine and on broken ones, and the shell's completion."""

import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from dspy_fst.cli import doctor as _  # noqa: F401  (the command; the module is taken from sys.modules)
from tests.cli.conftest import invoke

DOCTOR = sys.modules["dspy_fst.cli.doctor"]
WAIT_S = 60


def findings(code=0):
    told = json.loads(invoke("doctor", "--json", code=code).stdout)
    assert told["ok"] == (code == 0)
    return {finding["about"]: finding for finding in told["findings"]}


def versions(monkeypatch, **changed):
    """Let packages have another version; None is not installed."""
    true = DOCTOR.version

    def version(name):
        if name not in changed:
            return true(name)
        if changed[name] is None:
            raise PackageNotFoundError(name)
        return changed[name]

    monkeypatch.setattr(DOCTOR, "version", version)


def test_a_machine_that_runs_these_tests_has_nothing_wrong():
    told = findings()
    assert {"python", "dspy", "gepa", "torch", "transformers", "litellm", "memory", "disk here"} <= set(told)
    assert told["loopback ports"]["state"] == "ok"
    assert told["engine auto"]["found"].split()[0] in ("in_process", "vllm")


def test_a_package_outside_its_range_or_missing_is_wrong_and_says_what_to_install(monkeypatch):
    versions(monkeypatch, gepa="0.0.9", tenacity=None)
    told = findings(code=1)
    assert told["gepa"] == {
        "about": "gepa",
        "found": "0.0.9, needed ==0.1.4",
        "state": "wrong",
        "advice": "pip install 'gepa==0.1.4'",
    }
    assert (told["tenacity"]["found"], told["tenacity"]["state"]) == ("not installed", "wrong")
    text = invoke("doctor", code=1).stdout
    assert "- gepa: pip install 'gepa==0.1.4'" in text
    assert "nothing needed is wrong" not in text


def test_an_extra_that_is_not_there_says_what_it_brings_and_breaks_nothing(monkeypatch):
    versions(monkeypatch, matplotlib=None, uvicorn="0.1")
    told = findings()
    assert told["extra report"]["state"] == "missing"
    assert "pages and charts; in the clone: pip install '.[report]'" in told["extra report"]["advice"]
    assert told["extra serve"]["state"] == "warning"
    assert re.search(r"needed uvicorn\S*>=0.32", told["extra serve"]["found"])
    versions(monkeypatch, fastapi="0.200.0", uvicorn=None)  # also where another of its packages is not there
    told = findings()
    assert told["extra serve"]["state"] == "missing"
    assert re.search(r"needed fastapi\S*<0.137", told["extra serve"]["found"])


def test_an_old_python_is_wrong(monkeypatch):
    monkeypatch.setattr(DOCTOR.sys, "version_info", (3, 8, 1))
    finding = DOCTOR._python()
    assert (finding.state, finding.found) == ("wrong", "3.8.1, needed <3.13,>=3.11")


def test_keys_are_told_by_name_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    monkeypatch.setenv("EMPTY_API_KEY", "")
    result = invoke("doctor")
    assert "OPENAI_API_KEY" in result.stdout
    assert "EMPTY_API_KEY" not in result.stdout
    assert "sk-hidden" not in result.output


def test_ports_that_cannot_be_opened_are_wrong(monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError("not in this sandbox")

    monkeypatch.setattr(socket, "create_server", refused)
    finding = DOCTOR._loopback()
    assert finding.state == "wrong"
    assert "not in this sandbox" in finding.found


def test_more_threads_than_cores_are_warned_of(monkeypatch):
    monkeypatch.setattr(DOCTOR, "_cores", lambda: 2)
    assert DOCTOR._threads({"OMP_NUM_THREADS": "2"}).state == "ok"
    many = DOCTOR._threads({"OMP_NUM_THREADS": "16"})
    assert many.state == "warning"
    assert "export OMP_NUM_THREADS=2" in many.advice
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert DOCTOR._threads({}).state == "warning", "torch takes every core that the machine has"


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("max 100000", 8), ("10000 100000", 1)])
def test_a_container_s_quota_counts_as_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text(quota)
    assert DOCTOR._cores(tmp_path / "cpu.max") == cores
    assert DOCTOR._cores(tmp_path / "none") == 8


def test_little_room_and_few_files_are_warned_of(monkeypatch):
    assert DOCTOR._free("disk here", 10, 20, "free some").state == "warning"
    assert DOCTOR._free("disk here", 20, 20, "free some").state == "ok"
    monkeypatch.setattr(DOCTOR.resource, "getrlimit", lambda which: (256, 4096))
    assert "ulimit -n" in DOCTOR._open_files().advice


# ---- completion --------------------------------------------------------------------------------


def shell(**environment):
    """What the installed command prints when a shell asks it for completions."""
    command = Path(sys.executable).with_name("dspy-fst")
    done = subprocess.run([command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=WAIT_S)
    return done.stdout


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion_script(name):
    script = shell(_DSPY_FST_COMPLETE=f"source_{name}")
    assert "_DSPY_FST_COMPLETE" in script
    assert "dspy-fst" in script


def test_commands_are_completed():
    told = shell(_DSPY_FST_COMPLETE="complete_bash", COMP_WORDS="dspy-fst ", COMP_CWORD="1").split()
    assert {"init", "check", "doctor", "run"} <= set(told)
    assert shell(_DSPY_FST_COMPLETE="complete_bash", COMP_WORDS="dspy-fst do", COMP_CWORD="1").split() == ["doctor"]
