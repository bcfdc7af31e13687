"""Copies of folders on nodes that do not share them, through a real object store."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray

from dspy_fst.cluster.connecting import connected
from dspy_fst.engine.vllm.on_ray import copies as module
from dspy_fst.engine.vllm.on_ray.copies import ALIVE, PREFIX, Copies, Names, Sending, StoredFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def store(cluster):
    with connected(cluster.address):
        yield


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "step-000001"
    (made / "adapters").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "empty").touch()
    (made / "adapters/a.safetensors").write_bytes(bytes(range(256)) * 5)
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_is_copied_whole_in_chunks_and_once_while_machines_take_it(folder, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    put, puts = ray.put, []
    monkeypatch.setattr(ray, "put", lambda chunk: puts.append(len(chunk)) or put(chunk))
    sending, both = Sending(), threading.Barrier(2)
    machines = [Copies(2, keep_first=False) for _ in range(2)]
    found: list[Path] = []

    def take(machine):
        with sending.sent(Names().name(folder), folder) as sent:
            both.wait(60)
            found.append(machine.take(sent))

    threads = [threading.Thread(target=take, args=(machine,)) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [files_of(copy) for copy in found] == [files_of(folder)] * 2
    assert found[0] != found[1]
    assert sorted(puts) == [2, *[80], *[100] * 12]
    assert not sending._stored, "the store keeps nothing that nobody takes"


def test_a_folder_that_was_written_anew_is_another_and_one_that_is_removed_is_not(folder):
    names = Names()
    before = names.name(folder)
    assert Names().name(folder) == before
    (folder / "config.json").unlink()
    assert names.name(folder) == before, "it is being removed"
    (folder / "config.json").write_text("{} ")
    after = names.name(folder)
    assert after != before
    shutil.rmtree(folder)
    assert names.name(folder) == after
    with pytest.raises(FileNotFoundError, match="step-000001 is not there"):
        Names().name(folder)


def test_the_newest_copies_stay_and_the_base_of_adapters(folder):
    machine, sending = Copies(2, keep_first=True), Sending()
    names = []
    for number in range(5):
        (folder / "config.json").write_text(f"{{}}{' ' * number}")
        with sending.sent(Names().name(folder), folder) as sent:
            names.append(machine.take(sent).name)
        if number == 3:
            assert machine.find(names[2]), "asked for, so the one before it goes"
    kept = [name for name in names if machine.find(name)]
    assert kept == [names[0], names[2], names[4]]
    assert {path.name for path in machine._scratch.iterdir()} == {*kept, ALIVE}
    machine.close()
    assert not machine._scratch.exists()


def test_a_copy_that_breaks_off_is_none(folder, scratch):
    machine = Copies(2, keep_first=False)
    with Sending().sent("step-000001", folder) as sent:
        broken = StoredFolder(sent.name, (*sent.files, ("model.safetensors", (ray.put(7),))))  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            machine.take(broken)
        assert machine.find(sent.name) is None
        assert [path.name for path in machine._scratch.iterdir()] == [ALIVE]
        assert files_of(machine.take(sent)) == files_of(folder)


def test_what_a_killed_server_left_is_removed_by_the_next_one_there_and_nothing_else(scratch):
    make = "import os; from dspy_fst.engine.vllm.on_ray.copies import Copies; made = Copies(2, keep_first=False); "
    environment = {**os.environ, "TMPDIR": str(scratch)}
    subprocess.run([sys.executable, "-c", f"{make} os._exit(0)"], env=environment, check=True, timeout=120)
    (left,) = scratch.glob(f"{PREFIX}*/")
    alive, other = Copies(2, keep_first=False), scratch / "other"
    assert not left.exists()
    other.mkdir()
    Copies(2, keep_first=False)
    assert other.exists()
    assert alive._scratch.exists()
