"""`dspy-fst export --push-to-hub`, before a server on loopback that speaks a hub's protocol.

The command runs in a process of its own: huggingface_hub reads its hub's address when it is imported.
"""

import json
import os
import subprocess
import sys

import pytest

import dspy_fst
from dspy_fst.saving.export import export
from dspy_fst.saving.hub_upload import files_in
from tests.cli.hub_server import TOKEN, Hub
from tests.lora_program import two_adapters
from tests.serve.command import ROOT, saved_lab


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_lab(tmp_path_factory.mktemp("saved") / "program")


def run(hub, *arguments, token=TOKEN, code=0):
    """The command's stdout, or where it fails its stderr."""
    hidden = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nowhere", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "dspy_fst.cli", "export", *map(str, arguments)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == code, ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def test_every_file_of_the_folder_is_in_the_repository_in_one_commit(hub, saved, tmp_path):
    out = tmp_path / "out"
    told = run(hub, saved, out, "--push-to-hub", "some/model")
    assert hub.files == {name: (out / name).read_bytes() for name in files_in(out)}
    assert {"model.safetensors", "README.md", "program.json", "manifest.json"} <= hub.files.keys()
    (made,) = hub.created
    assert (made["organization"], made["name"]) == ("some", "model")
    assert "visibility" not in made, "public, unless the owner's default is private"
    assert hub.messages == ["Upload a program and its weights (dspy_fst)"]
    assert f"uploaded: {hub.url}/some/model/commit/abc" in told


def test_adapters_go_into_a_private_repository_under_the_base_s_hub_name(hub, tmp_path):
    folder = dspy_fst.save(two_adapters(tmp_path / "weights"), tmp_path / "saved")
    refused = run(hub, folder, tmp_path / "out", "--lora", "--push-to-hub", "some/lora", code=2)
    assert "which others do not have; give the name that it has on the hub with --base ORG/NAME" in refused
    assert not (tmp_path / "out").exists()
    flags = ("--lora", "--base", "org/base", "--push-to-hub", "some/lora", "--private", "--json")
    told = json.loads(run(hub, folder, tmp_path / "out", *flags))
    assert told["commit"] == f"{hub.url}/some/model/commit/abc"
    assert hub.created[-1]["visibility"] == "private"
    assert {f"{name}/adapter_model.safetensors" for name in ("for-first", "for-last")} <= hub.files.keys()
    config = json.loads(hub.files["for-first/adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/base"


def test_a_dry_run_lists_what_would_be_uploaded_and_asks_and_writes_nothing(hub, saved, tmp_path):
    told = run(hub, saved, tmp_path / "out", "--push-to-hub", "some/model", "--dry-run", token=None)
    assert hub.asked == []
    assert list(tmp_path.iterdir()) == []
    sizes = files_in(export(saved, tmp_path / "real"))
    assert told.startswith(f"would be uploaded to some/model ({len(sizes)} files, ")
    lines = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in told.splitlines()[1:-1]}
    assert lines == sizes


def test_without_a_token_nothing_is_asked_or_written(hub, saved, tmp_path):
    text = run(hub, saved, tmp_path / "out", "--push-to-hub", "some/model", token=None, code=2)
    assert "push_to_hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN; tokens" in text
    assert hub.asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_refused_upload_says_that_the_folder_is_there(hub, saved, tmp_path):
    hub.refuse = (403, "You have read access but not the required permissions for this operation")
    text = run(hub, saved, tmp_path / "out", "--push-to-hub", "some/model", code=1)
    assert f"{tmp_path / 'out'} is complete, and was not uploaded to some/model: " in text
    assert f"hf upload some/model {tmp_path / 'out'}" in text
    assert "403" in text
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dry-run", "--private"], "--private belongs to --push-to-hub ORG/NAME\n  - --dry-run belongs to"),
        (["--push-to-hub", "a/b/c", "--dry-run"], "push_to_hub='a/b/c': Repo id must be in the form"),
    ],
    ids=["no hub", "name"],
)
def test_flags_that_mean_nothing_are_refused(hub, saved, tmp_path, flags, complaint):
    assert complaint in run(hub, saved, tmp_path / "out", *flags, code=2)
    assert list(tmp_path.iterdir()) == []
