"""A run's copy in storage that outlives its machine: any URL that fsspec knows, e.g. ``s3://bucket/run``.

objects/9f86d0...      the content of a file, under its SHA-256; never changed
manifests/000007.json  written last: the files of state 7 and all that it needs, by name, with their sizes and digests

Every state is copied after it was committed in the run's own directory. A manifest that does not match its own checksum
was half written, and the one before it counts. Content stands under its digest, so a copy that breaks off changes no
file of a copy that was whole.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

from filelock import FileLock, Timeout
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from dspy_fst.errors import DiskError, RunDirectoryError, briefly
from dspy_fst.run.files import FileFacts, file_facts, flush, remove, scratch_beside, sha256_of
from dspy_fst.run.settling import settle_in_thread
from dspy_fst.run.state import RunState, peek_state, version_in

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMAT = 1
TRIES, PAUSE_S = 4, 2.0
"""Attempts of one call, and the pause after the first, which doubles (ours): a service's short failure is survived."""
CALL_S, BYTES_A_SECOND = 60.0, 1_000_000
"""A call may take so long, and a second more for so many bytes (ours: below any link on which a run makes sense)."""
PROBE_S = 20.0
"""Longest wait for an answer before a run, in seconds (ours)."""
MANIFEST, OBJECT = re.compile(r"(\d{6,})\.json"), re.compile(r"[0-9a-f]{64}")
"""Names that belong to the copy; everything else there is left alone."""
VERSION = re.compile(r"step-\d+(-warm)?|base")
T = TypeVar("T")
logger = logging.getLogger(__name__)


class RunCopy(TypedDict):
    """What a copy holds, e.g. state 7 and the files beside it."""

    format: int
    state: int
    """Number of the state."""
    events_bytes: int
    events_sha256: str
    """Of so many bytes of the events: what tells one run from another of the same recipe."""
    recipe: dict[str, object]
    files: dict[str, FileFacts]
    """Name below the run's directory -> its facts."""


def url_fault(url: str) -> str | None:
    """Why this is no URL of a storage that can be reached from here, as a sentence; None when it is."""
    import fsspec

    if "://" not in url:
        return f"storage={url!r} is no URL; write e.g. 's3://bucket/run', or 'file:///mnt/share/run'"
    protocol, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        return f"storage: the {protocol} URL holds a user or a password; give credentials by the environment instead"
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        return f"storage={url!r}: {briefly(error)}; install the package that fsspec names, or use another protocol"
    return None


class Storage:
    """The copy of one run.

    Args:
        url: Where it lies.
        keep: How many copies stay, as of states.
        tries, call_s: Attempts and seconds of a call; see `TRIES` and `CALL_S`.

    Raises:
        DiskError: the storage does not answer, or not in time. So do all methods.
    """

    def __init__(self, url: str, keep: int = 2, *, tries: int | None = None, call_s: float | None = None):
        self.url, self._keep = url, keep
        self._tries, self._call_s = tries or TRIES, call_s or CALL_S
        self._retries: list[str] = []
        self._digests: dict[tuple[str, int, int], FileFacts] = {}
        self._fs, self._root = self._call("opening it", lambda: _opened(url))
        self._last = max(self._copies(), default=-1)
        """State of the newest copy as this process knows it; -1 without one."""

    # ---- what is there ---------------------------------------------------------------------------

    def newest(self) -> RunCopy | None:
        """The newest copy that is whole; None before the first.

        Raises:
            RunDirectoryError: another release wrote it.
        """
        copies = self._copies()
        return copies[max(copies)] if copies else None

    def _copies(self) -> dict[int, RunCopy]:
        """Number of a state -> its copy, where that is whole."""
        copies: dict[int, RunCopy] = {}
        for path in self._listed("manifests"):
            if (found := MANIFEST.fullmatch(path.rpartition("/")[2])) and (manifest := _checked(self._read(path))):
                if manifest["format"] != FORMAT:
                    raise RunDirectoryError(f"storage={self.url!r}: {path} has a format that this release cannot read")
                copies[int(found[1])] = manifest
        return copies

    def _read(self, path: str) -> bytes:
        content: bytes = self._call(f"reading {path}", lambda: self._fs.cat_file(path))
        return content

    def _remove(self, path: str) -> None:
        self._call(f"removing {path}", lambda: self._fs.rm_file(path))

    def probe(self) -> None:
        """Write a file and remove it."""
        path = f"{self._root}/probe-{uuid.uuid4().hex}"
        self._put(path, b"probe")
        self._remove(path)

    def diverged(self, run_dir: Path, manifest: RunCopy) -> str | None:
        """Why the directory's run and the copy's are not one, as a sentence; None when one goes on from the other."""
        local = peek_state(run_dir / "states")
        if local is None:
            return None
        until, digest = manifest["events_bytes"], manifest["events_sha256"]
        if int(local.path.name) >= manifest["state"]:
            log = (run_dir / "events.jsonl").read_bytes()
        else:
            log = self._read(self._object(manifest["files"]["events.jsonl"]))
            until, digest = local.fields["events_bytes"], local.fields["events_sha256"]
        if hashlib.sha256(log[:until]).hexdigest() == digest:
            return None
        return (
            f"storage={self.url!r} and run_dir={str(run_dir)!r} hold two runs of the same recipe that went different "
            "ways; name another run_dir to go on from the storage, or another storage to go on from the directory"
        )

    def _listed(self, folder: str) -> dict[str, dict[str, object]]:
        """Path of each file -> what the storage says of it."""

        def ask() -> dict[str, dict[str, object]]:
            self._fs.invalidate_cache()
            found = self._fs.find(f"{self._root}/{folder}", detail=True)
            return found if isinstance(found, dict) else {}

        return self._call(f"listing {folder}", ask)

    def _manifest(self, number: int) -> str:
        return f"{self._root}/manifests/{number:06d}.json"

    def _object(self, facts: FileFacts) -> str:
        return f"{self._root}/objects/{facts['sha256']}"

    # ---- to the storage --------------------------------------------------------------------------

    def push(self, run_dir: Path, state: RunState) -> None:
        """Copy a committed state, and all that a run needs to go on from it; nothing where the storage has it.

        The weights must not change meanwhile.

        Raises:
            DiskError: another process has copied there, too.
        """
        number, copies = int(state.path.name), self._copies()
        if (found := max(copies, default=-1)) != self._last:
            raise DiskError(
                f"storage={self.url!r} was written by another process meanwhile; let only one of them go on. What was "
                f"committed in run_dir={str(run_dir)!r} is whole"
            )
        if found >= number:
            return
        objects = self._listed("objects")
        there = {path.rpartition("/")[2]: facts.get("size") for path, facts in objects.items()}
        files: dict[str, FileFacts] = {}
        for name, source in self._to_copy(run_dir, state):
            files[name] = facts = self._facts(source)
            if there.get(facts["sha256"]) != facts["bytes"]:  # a copy that broke off left a part
                self._put(self._object(facts), source)
                there[facts["sha256"]] = facts["bytes"]
        manifest: RunCopy = {
            "format": FORMAT,
            "state": number,
            "events_bytes": state.fields["events_bytes"],
            "events_sha256": state.fields["events_sha256"],
            "recipe": json.loads((run_dir / "recipe.json").read_bytes()),
            "files": files,
        }
        self._put(self._manifest(number), json.dumps({**manifest, "sha256": _digest(manifest)}).encode())
        self._last = number
        self._prune({**copies, number: manifest}, objects)

    def _to_copy(self, run_dir: Path, state: RunState) -> Iterator[tuple[str, Path | bytes]]:
        """Name below the directory, and the file or the content that is to be copied under it."""
        yield "recipe.json", (run_dir / "recipe.json").read_bytes()
        log = run_dir / "events.jsonl"  # goes on to grow
        yield "events.jsonl", log.read_bytes()[: state.fields["events_bytes"]] if log.exists() else b""
        for path in sorted((run_dir / "populations").glob("*.json")):
            yield f"populations/{path.name}", path.read_bytes()
        versions = (path for path in sorted((run_dir / "weights").iterdir()) if VERSION.fullmatch(path.name))
        kept = [path for path in versions if path.name == "base" or path.name <= version_in(state.fields)]
        for path in (file for folder in [*kept, state.path] for file in sorted(folder.rglob("*")) if file.is_file()):
            yield path.relative_to(run_dir).as_posix(), path

    def _facts(self, source: Path | bytes) -> FileFacts:
        if isinstance(source, bytes):
            return {"bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}
        stat = source.stat()
        key = (str(source), stat.st_mtime_ns, stat.st_size)
        if key not in self._digests:
            self._digests[key] = file_facts(source)
        return self._digests[key]

    def _put(self, path: str, source: Path | bytes) -> None:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size

        def put() -> None:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(source, bytes):
                self._fs.pipe_file(path, source)
            else:
                self._fs.put_file(str(source), path)

        self._call(f"writing {path}", put, size)

    def _prune(self, copies: Mapping[int, RunCopy], objects: Iterable[str]) -> None:
        """Remove all but the newest copies, and those of the objects that none of them names."""
        kept = sorted(copies)[-self._keep :]
        for number in copies.keys() - set(kept):
            self._remove(self._manifest(number))
        used = {facts["sha256"] for number in kept for facts in copies[number]["files"].values()}
        for path in objects:
            if OBJECT.fullmatch(name := path.rpartition("/")[2]) and name not in used:
                self._remove(path)

    # ---- from the storage ------------------------------------------------------------------------

    def pull(self, run_dir: Path) -> bool:
        """Put the newest whole copy into the directory, where that has none or an older state; whether it did.

        Raises:
            RunDirectoryError: a run uses the directory, went another way than the copy, or the copy is damaged.
        """
        manifest, local = self.newest(), peek_state(run_dir / "states")
        if manifest is None or (local is not None and int(local.path.name) >= manifest["state"]):
            return False
        if fault := self.diverged(run_dir, manifest):
            raise RunDirectoryError(fault)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(run_dir / ".lock", timeout=0), scratch_beside(run_dir) as scratch:
                for name, facts in manifest["files"].items():
                    self._get(facts, scratch / name)
                _put_in_place(scratch, run_dir, manifest)
        except Timeout:
            raise RunDirectoryError(f"run_dir={str(run_dir)!r} is in use by another run; name another") from None
        return True

    def _get(self, facts: FileFacts, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = self._object(facts)
        self._call(f"reading {there}", lambda: self._fs.get_file(there, str(path)), facts["bytes"])
        if path.stat().st_size != facts["bytes"] or sha256_of(path) != facts["sha256"]:
            raise RunDirectoryError(
                f"storage={self.url!r} is damaged: {there} does not match its name, which is its checksum; restore it "
                "from a copy, or name another storage. Nothing was changed"
            )
        flush(path)

    # ---- calls that may fail ---------------------------------------------------------------------

    def take_warnings(self) -> list[str]:
        """What had to be tried again since this was last asked, in words."""
        told, self._retries = self._retries, []
        return [f"storage: {len(told)} calls failed and were made again; the last was {told[-1]}"] if told else []

    def _call(self, what: str, call: Callable[[], T], size: int = 0) -> T:
        retrying = self._retrying(what)
        try:
            return retrying(_within, self._call_s + size / BYTES_A_SECOND, call)
        except Exception as error:  # each protocol's package has errors of its own
            raise DiskError(
                f"storage={self.url!r} failed ({retrying.statistics['attempt_number']} tries): {what}: "
                f"{briefly(error)}; mend it, then go on with the same run_dir and storage. What was committed is whole"
            ) from error

    def _retrying(self, what: str) -> Retrying:
        """Repeats a call that failed, unless it would fail again."""

        def note(state: RetryCallState) -> None:
            assert state.outcome is not None
            error = state.outcome.exception()
            assert error is not None
            self._retries.append(f"{what}: {briefly(error)}")
            logger.warning("storage: %s; it is tried again", self._retries[-1])

        final = (ImportError, PermissionError, FileNotFoundError)
        return Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, final)),
            stop=stop_after_attempt(self._tries),
            wait=wait_exponential(PAUSE_S),
            before_sleep=note,
            reraise=True,
        )


def _opened(url: str) -> "tuple[AbstractFileSystem, str]":
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What the call returns. One that takes longer is left to itself: no protocol's package promises to end."""
    answer: Future[T] = Future()
    settle_in_thread(answer, call, "storage")
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer after {seconds:.0f} s")
    return answer.result()


def _digest(manifest: RunCopy) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _checked(content: bytes) -> RunCopy | None:
    """A manifest that is whole; None for a part of one."""
    try:
        manifest = json.loads(content)
    except ValueError:
        return None
    if not isinstance(manifest, dict):
        return None
    digest = manifest.pop("sha256", None)
    whole = cast(RunCopy, manifest)
    return whole if digest == _digest(whole) else None


def _put_in_place(scratch: Path, run_dir: Path, manifest: RunCopy) -> None:
    """Move what was fetched into the directory. The recipe comes first, which makes it a run's, and the state last."""
    last = Path("states", f"{manifest['state']:06d}")
    names = (Path(name) for name in manifest["files"])
    units = {Path(*name.parts[:2]) if len(name.parts) > 1 else name for name in names} - {last, Path("recipe.json")}
    for unit in [Path("recipe.json"), *sorted(units), last]:
        (run_dir / unit).parent.mkdir(parents=True, exist_ok=True)
        remove(run_dir / unit)
        (scratch / unit).rename(run_dir / unit)
        flush((run_dir / unit).parent)
