"""States of ranks that share the weights: in parts, and read by any number of processes."""

import errno
import json
import os
import pickle
import resource
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dspy_fst.errors import RankError, RunDirectoryError, TrainingError
from dspy_fst.run.files import DCP_METADATA
from dspy_fst.run.state import commit_state, newest_state
from dspy_fst.slow.checkpoint import read_state
from dspy_fst.slow.ranks import writing
from dspy_fst.slow.ranks.parts import _Writer
from dspy_fst.slow.ranks.writing import PartsWriter
from tests.ranks.launching import by_hand, by_torchrun
from tests.ranks.lessons import SHAREABLE, STATES, furthest, trained
from tests.slow.conftest import one_thread  # noqa: F401
from tests.slow.makers import save_model

HERE = Path(__file__).parent
ENDLESS = b"\x80\x04\x95" + b"\xff" * 8
"""A pickle that names its length: all that there are."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The models, and beside each case's the state of one process that trained it."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "untied")
    save_model(folder / "tied", tied=True)
    torch.set_num_threads(1)
    for name, case in SHAREABLE.items():
        trainer = case.trainer(folder)
        trained(trainer)
        trainer.save_state(folder / f"{name} state")
    return folder


@pytest.fixture(scope="module")
def of_two(models, tmp_path_factory) -> Path:
    """States that two ranks read from one file, and wrote in parts."""
    return shared(models, tmp_path_factory.mktemp("two") / "out", models, 2)


@pytest.fixture(scope="module")
def of_four(models, of_two, tmp_path_factory) -> Path:
    """The same, as four ranks read them from the parts of two, and wrote them again."""
    return shared(of_two, tmp_path_factory.mktemp("four") / "out", models, 4)


def shared(states: Path, out: Path, models: Path, ranks: int) -> Path:
    done = by_torchrun(HERE / "share_states.py", states, out, models, ranks=ranks)
    assert done.returncode == 0, done.stdout[-4000:]
    return out


@pytest.mark.parametrize("name", SHAREABLE)
def test_a_state_is_the_same_bit_for_bit_whoever_wrote_and_read_it(models, of_two, of_four, name):
    wanted, facts = read_state(models / f"{name} state", {})
    for folder in (of_two, of_four):
        found, told = read_state(folder / f"{name} state", {})
        assert found.keys() == wanted.keys()
        assert any(tensor.startswith("exp_avg_sq/") for tensor in found)
        assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
        assert {**told, "format": facts["format"]} == facts


@pytest.mark.parametrize("name", STATES)
def test_each_rank_writes_its_share_and_puts_nothing_together(of_two, of_four, name):
    for folder, ranks in ((of_two, 2), (of_four, 4)):
        sizes = {file.name: file.stat().st_size for file in (folder / f"{name} state").iterdir()}
        of_ranks = [sizes.pop(f"__{rank}_0.distcp") for rank in range(ranks)]
        assert sizes.keys() == {DCP_METADATA, "state.json"}
        tensors, _ = read_state(folder / f"{name} state", {})
        shares = sum(tensor.nbytes for of, tensor in tensors.items() if not of.startswith(("step/", "generator/")))
        archives = 2000 * len(tensors)  # what torch writes beside the numbers of one tensor, at most
        assert all(size < shares / ranks * 1.25 + archives for size in of_ranks)
        assert sum(of_ranks) > shares


@pytest.mark.parametrize("name", SHAREABLE)
def test_ranks_that_go_on_from_parts_are_those_that_were_not_interrupted(of_two, name):
    never, resumed = torch.load(of_two / f"{name}.pt", weights_only=False)
    assert furthest(resumed, never) == 0


@pytest.mark.parametrize("name", STATES)
def test_one_process_goes_on_from_parts_and_takes_their_moments_over(models, of_two, name):
    trainers = [SHAREABLE[name].trainer(models) for _ in range(3)]
    trainers[0].load_state(models / f"{name} state")
    trainers[1].load_state(of_two / f"{name} state")
    for trainer in trainers[:2]:
        trained(trainer, 5, 1)
    assert furthest(dict(trainers[1].parameters), dict(trainers[0].parameters)) == 0
    assert trainers[2].load_optimizer(of_two / f"{name} state") == []
    assert trainers[2].updates == 5


def test_a_full_disk_and_a_folder_that_is_not_seen_are_told_with_the_rank(of_two):
    told = json.loads((of_two / "told.json").read_text())
    assert told["full"] == "OSError: [Errno 27] rank 1: File too large"
    assert told["unseen"].startswith(f"rank 1 does not see {of_two / 'elsewhere'} as rank 0 does: with sharding='fsdp'")
    assert not (of_two / "too large").exists()
    assert read_state(of_two / "after it", {})
    assert [file.name for file in of_two.iterdir() if file.name.startswith(".")] == []


def test_what_the_disk_said_is_not_hidden_by_the_archive_that_could_not_be_written(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointException) as told, pytest.warns(UserWarning, match="single process"):
            dcp.save({"large": torch.ones(100_000)}, storage_writer=_Writer(tmp_path), no_dist=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.failures[0][0].errno == errno.EFBIG


def failure_of_writing(writer: _Writer, planner: dcp.DefaultSavePlanner | None = None) -> BaseException:
    with pytest.raises(CheckpointException) as told, pytest.warns(UserWarning, match="single process"):
        dcp.save({"ones": torch.ones(3)}, storage_writer=writer, planner=planner, no_dist=True)
    return told.value.failures[0][0]


def test_a_rank_makes_no_folder_where_it_does_not_see_rank_0_s(tmp_path):
    failure = failure_of_writing(_Writer(tmp_path / "elsewhere"))
    assert isinstance(failure, RankError)
    assert str(failure).startswith(f"{tmp_path / 'elsewhere'} is not seen there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [None, 10])
def test_a_part_that_rank_0_does_not_see_whole_makes_no_state(tmp_path, left):
    class Losing(_Writer):
        def write_data(self, *arguments):
            written = super().write_data(*arguments)
            (file,) = tmp_path.iterdir()
            os.truncate(file, left) if left else file.unlink()
            return written

    failure = failure_of_writing(Losing(tmp_path))
    assert isinstance(failure, RankError)
    assert f"the whole of {tmp_path / '__0_0.distcp'} is not seen there" in str(failure)
    assert not (tmp_path / DCP_METADATA).exists()


def test_an_error_that_the_disk_has_not_caused_is_told_as_it_is(tmp_path):
    class Failing(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item):
            raise KeyError("of the planner")

    failure = failure_of_writing(_Writer(tmp_path), Failing())
    assert (type(failure), failure.__cause__) == (KeyError, None)  # one that is its own cause has no end


@pytest.fixture
def group():
    """This process is the only one of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_state_that_was_given_up_is_not_written(group, tmp_path):
    writer = PartsWriter(0, dist.HashStore(), lambda: None, lambda: None)
    write = writer.begin({"ones": torch.ones(3)})
    writer.settle()
    with pytest.raises(RankError, match="the run is over, so the state is not written"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    writer.begin({"ones": torch.ones(3)})(tmp_path)
    assert (tmp_path / DCP_METADATA).exists()


@pytest.mark.parametrize("begun", [True, False])
def test_a_state_whose_store_is_gone_is_not_waited_for(group, tmp_path, monkeypatch, begun):
    """The store of ranks is torchrun's, which may have been killed."""

    def gone(*arguments):
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(writing, "STATE_S", 5.0)
    writer = PartsWriter(0, dist.HashStore(), lambda: None, lambda: None)
    write = writer.begin({"ones": torch.ones(3)})
    writer._store = SimpleNamespace(set=gone)
    with pytest.raises(RuntimeError, match="Broken pipe"):
        write(tmp_path) if begun else writer.settle()
    began = time.monotonic()
    writer.settle()
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("name", ["__1_0.distcp", DCP_METADATA])
def test_a_part_with_a_byte_changed_or_lost_is_refused(of_two, tmp_path, name):
    state = commit_state(tmp_path, {}, partial(shutil.copytree, of_two / "full state"), None, keep=2)
    unmoved = commit_state(tmp_path, {}, None, state, keep=2)
    assert newest_state(tmp_path).files.keys() == unmoved.files.keys() == state.files.keys()
    assert read_state(unmoved.path / "trainer", {})
    file = unmoved.path / "trainer" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # the other state has it, too
    with pytest.raises(RunDirectoryError, match=rf"missing or foreign files: trainer/{name}"):
        newest_state(tmp_path)
    file.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=rf"trainer/{name} does not match its checksum"):
        newest_state(tmp_path)


@pytest.mark.parametrize(
    "content", [pickle.dumps(os.getcwd), pickle.dumps([1]), b"", b"\x80", b"\x80\x04\x95" + b"\xff" * 8]
)
def test_metadata_that_names_something_else_is_not_obeyed(tmp_path, content):
    (tmp_path / "state.json").write_text('{"format": 2, "updates": 1}')
    (tmp_path / DCP_METADATA).write_bytes(content)
    with pytest.raises(TrainingError, match=r"no training state can be read from .*metadata"):
        read_state(tmp_path, {})


@pytest.mark.parametrize(("at", "left"), [("first", []), ("second", ["before"])])
def test_a_rank_that_is_killed_while_a_state_is_written_is_named_and_the_state_before_is_whole(
    models, tmp_path, at, left
):
    out = tmp_path / "out"
    out.mkdir()
    (first, printed), (second, _) = by_hand(HERE / "share_states.py", models, out, models, DIES=at)
    assert (first, second) == (0, -9), printed
    assert "told: rank 1 died (process " in printed
    assert "so the state is not written" in printed
    assert [file.name for file in out.iterdir()] == left
    assert all(read_state(out / name, {})[1]["updates"] == 0 for name in left)
