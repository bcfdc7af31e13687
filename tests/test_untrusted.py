"""A saved program is whole or refused; one from somebody else runs no code, reads nothing else and holds no secrets."""

import json
import logging
import os
import pickle
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import dspy
import pytest
from dspy.predict.parameter import Parameter
from hypothesis import given
from hypothesis import strategies as st

import dspy_fst
from dspy_fst import ConfigurationError, PolicyLM
from dspy_fst.engine.options import OF_ENGINE, InProcessSettings, PortableOptions
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import RunDirectoryError
from dspy_fst.rollout.components import read_texts
from dspy_fst.saving import manifest
from dspy_fst.saving.manifest import MANIFEST, seal
from dspy_fst.types import Candidate, Population
from programs.lab import BASE
from tests.relay import Relay, relay

KEY = "topsecret-value-1"
FILES = ["program.json", "population.json", "policy.json", "weights/config.json", "weights/model.safetensors"]


def compiled_relay(**engine_options):
    """A program as compile() returns it, its weights those of the base."""
    program = relay()
    program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=12, temperature=1.5, engine_options=engine_options))
    program.population = Population.of_seed(read_texts(program), 2)
    return program


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return dspy_fst.save(compiled_relay(), tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def saved(pristine, tmp_path):
    """A folder of one's own to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def edit(folder, name, change):
    """Change a JSON document, and the manifest with it: who sends a folder writes its checksums too."""
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    reseal(folder)


def reseal(folder):
    (folder / MANIFEST).unlink(missing_ok=True)
    seal(folder, "0")


def refusal(folder, program=None, error=RunDirectoryError, **settings):
    with pytest.raises(error) as caught:
        dspy_fst.load(folder, program or Relay(), **settings)
    return str(caught.value)


# ---- whole ----------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(saved):
    loaded = dspy_fst.load(saved, Relay())
    assert loaded.population == compiled_relay().population
    assert loaded.first.lm.checkpoint.path == saved / "weights"
    assert json.loads((saved / MANIFEST).read_text())["package"] == "0.1.0"


@pytest.mark.parametrize("name", [*FILES, "weights/tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    message = refusal(saved)
    assert f"{name} is missing" in message
    assert "copy the folder again" in message


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(saved, name):
    size = (saved / name).stat().st_size
    os.truncate(saved / name, size - 1)
    assert f"{name} has {size - 1} bytes instead of {size}" in refusal(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    assert f"{name} was changed" in refusal(saved)


@pytest.mark.parametrize("name", ["notes.txt", "weights/pytorch_model.bin", "weights/.hidden", "other/x.json"])
def test_a_file_that_is_not_on_the_list_is_named(saved, name):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("")
    assert f"{name} does not belong to the saved program" in refusal(saved)


def test_a_folder_of_an_earlier_release_is_refused_with_a_way_out(saved):
    (saved / MANIFEST).unlink()
    message = refusal(saved)
    assert "saved by an earlier release" in message
    assert "compile again with its run_dir" in message


def test_a_folder_of_a_later_release_is_refused(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format": 3, "package": "9.9"}))
    message = refusal(saved)
    assert "has format 3, this release reads 2" in message
    assert "'9.9'" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 2}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(saved, content):
    (saved / MANIFEST).write_text(content)
    assert MANIFEST in refusal(saved)


def test_what_is_no_folder_is_refused(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere")


@given(st.data())
def test_no_change_of_a_byte_goes_unseen(pristine, tmp_path_factory, data):
    saved = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("flip") / "out"))
    path = saved / data.draw(st.sampled_from([*FILES, MANIFEST]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = dspy_fst.load(saved, Relay())
    except RunDirectoryError:
        return
    finally:
        shutil.rmtree(saved)
    assert path.name == MANIFEST  # of the list only the release's name may change
    assert loaded.population == compiled_relay().population


# ---- written whole --------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dspy_fst.saving.save_load, "seal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dspy_fst.save(compiled_relay(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_save_touches_no_other_folder(tmp_path):
    (tmp_path / "out.new").mkdir()
    (tmp_path / "out.new" / "mine").write_text("")
    dspy_fst.save(compiled_relay(), tmp_path / "out")
    assert (tmp_path / "out.new" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.new"]


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    flushed = set()
    flush = os.fsync

    def fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        assert not (tmp_path / "out").exists() or os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    dspy_fst.save(compiled_relay(), tmp_path / "out")
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "out", *(tmp_path / "out").rglob("*"))} <= flushed


def test_weights_that_could_not_be_loaded_again_are_not_saved(tmp_path):
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    (model / "modeling_mine.py").write_text("")
    program = compiled_relay()
    program.set_lm(PolicyLM(model, engine="in_process"))
    with pytest.raises(RunDirectoryError, match=r"modeling_mine\.py"):
        dspy_fst.save(program, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_predictor_keeps_its_own_sampling(tmp_path):
    program = compiled_relay()
    program.last.lm = program.first.lm.copy(temperature=0.5, max_tokens=9)
    dspy_fst.save(program, tmp_path / "out")
    loaded = dspy_fst.load(tmp_path / "out", Relay())
    assert [(p.lm.kwargs["temperature"], p.lm.kwargs["max_tokens"]) for p in (loaded.first, loaded.last)] == [
        (1.5, 12),
        (0.5, 9),
    ]
    assert loaded.first.lm.handle is loaded.last.lm.handle
    changed = dspy_fst.load(tmp_path / "out", Relay(), temperature=0.7)
    assert [p.lm.kwargs["temperature"] for p in (changed.first, changed.last)] == [0.7, 0.7]


def test_demos_and_instructions_come_back(tmp_path):
    program = compiled_relay()
    program.first.demos = [dspy.Example(numbers="1 2", answer="2 1").with_inputs("numbers")]
    program.last.signature = program.last.signature.with_instructions("Drop it — größer, 数.")
    dspy_fst.save(program, tmp_path / "out")
    loaded = dspy_fst.load(tmp_path / "out", Relay())
    assert dict(loaded.first.demos[0]) == {"numbers": "1 2", "answer": "2 1"}
    assert loaded.last.signature.instructions == "Drop it — größer, 数."


# ---- no code, nothing outside ---------------------------------------------------------------------


class Marks:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "modeling_evil.py", "consolidated.pth"])
def test_only_plain_files_are_read(saved, tmp_path, name):
    (saved / "weights" / name).write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    reseal(saved)
    assert f"weights/{name}" in refusal(saved)
    assert not (tmp_path / "mark").exists()


def test_a_folder_among_the_weights_is_refused(saved):
    (saved / "weights" / "custom.json").mkdir()
    (saved / "weights" / "custom.json" / "generate.py").write_text("")
    reseal(saved)
    assert "weights/custom.json" in refusal(saved)


@pytest.mark.parametrize("name", ["evil.py", "program.pkl", "more.json"])
def test_a_foreign_file_on_the_list_is_refused_too(saved, name):
    (saved / name).write_text("{}")
    reseal(saved)
    assert f"{name} is no part of a saved program" in refusal(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_without_their_parts_are_refused(saved, name):
    (saved / "weights" / name).unlink()
    reseal(saved)
    assert f"weights/{name} is missing" in refusal(saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json"])
def test_files_that_name_other_weights_are_refused(saved, name):
    (saved / "weights" / name).write_text("{}")
    reseal(saved)
    assert f"weights/{name}" in refusal(saved)


LEADING_OUT = [
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"}}, "auto_map"),
    ("config.json", {"text_config": {"parts": [{"auto_map": {"AutoConfig": "evil.Evil"}}]}}, "auto_map"),
    ("config.json", {"_attn_implementation": "evil/kernel"}, "_attn_implementation"),
    ("config.json", {"transformers_weights": "../../elsewhere.safetensors"}, "transformers_weights"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "auto_map"),
    ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file"),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "init_inputs"),
    ("generation_config.json", {"custom_pipelines": {"x": {"impl": "evil.Evil"}}}, "custom_pipelines"),
]


@pytest.mark.parametrize(("name", "added", "key"), LEADING_OUT)
def test_a_configuration_that_leads_out_is_refused(saved, name, added, key):
    edit(saved, f"weights/{name}", lambda document: document.update(added))
    assert f"weights/{name} sets {key!r}" in refusal(saved)


def test_the_refusal_of_a_model_s_own_code_says_why(saved):
    edit(saved, "weights/config.json", lambda document: document.update(auto_map={"AutoConfig": "evil.Evil"}))
    assert "trust_remote_code stays off" in refusal(saved)


def test_a_configuration_nested_without_end_is_refused(saved):
    (saved / "weights" / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    reseal(saved)
    assert "config.json cannot be read" in refusal(saved)


@pytest.mark.parametrize("target", ["outside", "inside", "folder"])
def test_links_are_not_followed(saved, tmp_path, target):
    (tmp_path / "secret.json").write_text("{}")
    if target == "folder":
        shutil.move(saved / "weights", tmp_path / "elsewhere")
        (saved / "weights").symlink_to(tmp_path / "elsewhere")
        name = "weights"
    else:
        name = "population.json"
        (saved / name).rename(saved / "weights" / "kept.json")
        (saved / name).symlink_to(tmp_path / "secret.json" if target == "outside" else saved / "weights" / "kept.json")
    assert f"{name} is a link" in refusal(saved)


def test_a_pipe_is_not_waited_for(saved):
    os.mkfifo(saved / "weights" / "merges.txt")
    assert "merges.txt is a link or no ordinary file" in refusal(saved)


def test_documents_beyond_the_limit_are_not_read(saved, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 2000)
    (saved / "population.json").write_text(" " * 2001)
    assert "population.json is larger than 2000 bytes" in refusal(saved)


def test_more_files_than_a_saved_program_has_are_not_read(saved, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_FILES", 5)
    assert "more than 5 files" in refusal(saved)


opened: list[str] | None = None


def audit(event, arguments):
    if opened is not None and event in ("open", "socket.connect", "subprocess.Popen", "os.system", "exec"):
        opened.append(f"{event} {arguments[0]}")


sys.addaudithook(audit)


def test_loading_opens_nothing_but_the_folder(saved):
    global opened
    dspy_fst.load(saved, Relay())  # what is imported late is imported now
    opened = []
    try:
        dspy_fst.load(saved, Relay())
    finally:
        seen, opened = opened, None
    assert len(seen) > len(FILES)
    assert [event for event in seen if not event.startswith(f"open {saved}/")] == []


# ---- policy.json ----------------------------------------------------------------------------------

MACHINE = {
    "extra_args": ["--trust-remote-code"],
    "attach_url": f"http://me:{KEY}@elsewhere/v1",
    "api_key": KEY,
    "host": "0.0.0.0",
    "port": 80,
    "log_path": "/etc/cron.d/evil",
    "device": "cuda:7",
    "request_timeout_s": 1e9,
    "trust_remote_code": True,
}


@pytest.mark.parametrize("option", MACHINE)
def test_what_belongs_to_the_machine_is_not_loaded(saved, option):
    edit(saved, "policy.json", lambda document: document["policy"]["engine_options"].update({option: MACHINE[option]}))
    message = refusal(saved)
    assert f"policy.engine_options.{option}" in message
    assert "give the rest to load(), e.g. engine_options" in message
    assert KEY not in message


POLICIES = [
    ({"engine_options": {"max_model_len": "8192; rm -rf"}}, "max_model_len"),
    ({"engine_options": {"dtype": "--config=/tmp/evil.yaml"}}, "dtype"),
    ({"engine_options": {"gpu_memory_utilization": 7.0}}, "gpu_memory_utilization"),
    ({"engine": "mine.Engine"}, "engine"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": float("inf")}, "temperature"),
    ({"api_base": "http://elsewhere"}, "api_base"),
    ({"_dspy_lm_class": "evil.LM"}, "_dspy_lm_class"),
]


@pytest.mark.parametrize(("changes", "where"), POLICIES)
def test_a_policy_of_another_form_is_refused(saved, changes, where):
    edit(saved, "policy.json", lambda document: document["policy"].update(changes))
    assert f"policy.{'engine_options.' if 'engine_options' in changes else ''}{where}" in refusal(saved)


def test_the_saved_model_is_the_one_beside_the_policy(saved, tmp_path):
    edit(saved, "policy.json", lambda document: document["policy"].update(model="/etc"))
    assert dspy_fst.load(saved, Relay()).first.lm.checkpoint.path == saved / "weights"


def test_portable_options_are_saved_and_added_to(tmp_path):
    dspy_fst.save(compiled_relay(max_batch_tokens=99, linger_s=0.1, device="cpu"), tmp_path / "out")
    options = json.loads((tmp_path / "out" / "policy.json").read_text())["policy"]["engine_options"]
    assert options == {"max_batch_tokens": 99}
    loaded = dspy_fst.load(tmp_path / "out", Relay(), engine_options={"device": "cpu"})
    assert loaded.first.lm.handle.options == {"max_batch_tokens": 99, "device": "cpu"}
    other = dspy_fst.load(tmp_path / "out", Relay(), engine="vllm", engine_options={"max_model_len": 64})
    assert other.first.lm.handle.options == {"max_model_len": 64}


@pytest.mark.parametrize(("engine", "settings"), [("vllm", VLLMSettings), ("in_process", InProcessSettings)])
def test_the_portable_options_are_the_engine_s(engine, settings):
    assert OF_ENGINE[engine] <= {field.name for field in fields(settings)}
    assert set().union(*OF_ENGINE.values()) == PortableOptions.model_fields.keys()


def test_dspy_s_own_save_holds_nothing_of_the_machine_either(tmp_path):
    program = dspy.Predict("question -> answer")
    options = {"attach_url": "http://h", "api_key": KEY, "max_model_len": 64, "extra_args": ("--x",)}
    program.set_lm(PolicyLM("no-model", engine="vllm", engine_options=options))
    program.save(str(tmp_path / "program.json"))
    state = json.loads((tmp_path / "program.json").read_text())
    assert state["lm"]["engine_options"] == {"max_model_len": 64}
    loaded = dspy.Predict("question -> answer")
    loaded.load(str(tmp_path / "program.json"), allow_unsafe_lm_state=True)
    assert loaded.lm.handle.options == {"max_model_len": 64}
    state["lm"]["engine_options"] = options
    with pytest.raises(ConfigurationError, match=r"engine_options\.attach_url") as caught:
        PolicyLM.load_state(state["lm"])
    assert KEY not in str(caught.value)


# ---- program.json and population.json -------------------------------------------------------------

STATES = [
    ({"lm": {"model": "openai/gpt-5", "api_base": "http://elsewhere"}}, "first: lm"),
    ({"lm": {"_dspy_lm_class": "tests.test_untrusted.Marks", "mark": "x"}}, "first: lm"),
    ({"config": {"api_base": "http://elsewhere"}}, "first: config"),
    ({"forward": "evil"}, "first: forward"),
    ({"demos": "evil"}, "first: demos"),
    ({"demos": [1]}, "first: demos.0"),
    ({"signature": {"instructions": ["evil"], "fields": []}}, "first: signature.instructions"),
    ({"signature": {"instructions": "short", "fields": []}}, "the fields of first differ"),
    ({"fields": {"answer": {"threshold": 2}}}, "DSPy cannot load it"),
]


@pytest.mark.parametrize(("changes", "where"), STATES)
def test_a_predictor_s_state_of_another_form_is_refused(saved, changes, where):
    edit(saved, "program.json", lambda document: document["first"].update(changes))
    assert where in refusal(saved)


@pytest.mark.parametrize("change", [lambda d: d.pop("first"), lambda d: d.update(other=d["first"])])
def test_a_state_of_other_parts_is_refused(saved, change):
    edit(saved, "program.json", change)
    assert "another program" in refusal(saved)


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "[" * 50_000])
@pytest.mark.parametrize("name", FILES[:3])
def test_a_document_of_another_form_is_refused(saved, name, content):
    (saved / name).write_text(content)
    reseal(saved)
    assert name in refusal(saved)


POPULATIONS = [
    (lambda d: d["members"][1].update(other="x"), "predictors that differ: ['other']"),
    (lambda d: d["members"][1].update(first=1), "members.1.first"),
    (lambda d: d["scores"].pop(), "a score, or null, for each member"),
    (lambda d: d.update(members=[], scores=[]), "members"),
]


@pytest.mark.parametrize(("change", "where"), POPULATIONS)
def test_a_population_of_another_form_is_refused(saved, change, where):
    edit(saved, "population.json", change)
    assert where in refusal(saved)


class Source(dspy.Module, Parameter):
    """A parameter whose state is code, as dspy.Flex's is."""

    def __init__(self):
        super().__init__()
        self.source = "return 1"

    def dump_state(self, json_mode=True):
        return {"source": self.source}

    def load_state(self, state, *, allow_unsafe_lm_state=False):
        raise AssertionError("the state of a parameter that is no predictor was loaded")


class WithSource(Relay):
    def __init__(self):
        super().__init__()
        self.tool = Source()


def test_code_in_a_program_s_state_is_not_loaded(tmp_path):
    program = WithSource()
    program.set_lm(PolicyLM(BASE, engine="in_process"))
    program.population = Population.of_seed(read_texts(program), 2)
    saved = dspy_fst.save(program, tmp_path / "out")
    edit(saved, "program.json", lambda document: document["tool"].update(source="import os"))
    assert "tool is not a predictor and differs from this program's" in refusal(saved, WithSource())


class WithFlex(Relay):
    def __init__(self):
        super().__init__()
        self.tool = dspy.Flex("question -> answer")


FOREIGN = "class X:\n    def forward(self, **inputs):\n        import os"
CODE = {
    "in the state": ("program.json", lambda document: document["tool"].update(module_src=FOREIGN)),
    "in the population": ("population.json", lambda document: document["members"][1].update(tool=FOREIGN)),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", CODE)
def test_a_foreign_source_of_a_flex_is_taken_up_only_when_it_is_trusted(where, tmp_path):
    program = WithFlex()
    program.set_lm(PolicyLM(BASE, engine="in_process"))
    program.population = Population.of_seed(read_texts(program), 2)
    saved = dspy_fst.save(program, tmp_path / "out")
    assert dspy_fst.load(saved, WithFlex()).tool.module_src == program.tool.module_src
    edit(saved, *CODE[where])
    assert "another source for the dspy.Flex 'tool'" in refusal(saved, WithFlex())
    loaded = dspy_fst.load(saved, WithFlex(), trust_code=True)
    assert FOREIGN in {loaded.tool.module_src, *(member.texts["tool"] for member in loaded.population.members)}


def test_a_population_of_several_sources_is_saved_and_loaded_again(tmp_path):
    program = WithFlex()
    program.set_lm(PolicyLM(BASE, engine="in_process"))
    own = read_texts(program)
    other = Candidate({**own.texts, "tool": own.texts["tool"] + "\n# another"})
    program.population = Population((own, other), (1.0, 0.5))
    saved = dspy_fst.save(program, tmp_path / "out")
    assert dspy_fst.load(saved, WithFlex(), trust_code=True).population.members == (own, other)


def test_a_flex_s_state_may_set_nothing_but_its_source(tmp_path):
    program = WithFlex()
    program.set_lm(PolicyLM(BASE, engine="in_process"))
    program.population = Population.of_seed(read_texts(program), 2)
    saved = dspy_fst.save(program, tmp_path / "out")
    edit(saved, "program.json", lambda document: document["tool"].update(lm={"model": "theirs"}))
    assert "tool: lm" in refusal(saved, WithFlex())


# ---- frozen LMs and secrets -----------------------------------------------------------------------


def mixed():
    """A program whose last predictor speaks with a frozen LM that holds a key in every place that takes one."""
    program = compiled_relay()
    program.last.lm = dspy.LM(
        "openai/gpt-5-mini",
        api_key=KEY,
        api_base=f"http://me:{KEY}@gateway/v1",
        extra_headers={"Authorization": f"Bearer {KEY}"},
        aws_secret_access_key=KEY,
        launch_kwargs={"token": KEY},
    )
    return program


def test_a_frozen_lm_s_keys_and_address_are_not_saved(tmp_path):
    folder = dspy_fst.save(mixed(), tmp_path / "out")
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert KEY.encode() not in content
    assert b"gateway" not in content
    assert b"gpt-5-mini" in content


def test_a_program_s_frozen_lm_is_the_user_s(tmp_path, caplog):
    folder = dspy_fst.save(mixed(), tmp_path / "out")
    message = refusal(folder, error=ConfigurationError)
    assert "predictor 'last' called the frozen LM 'openai/gpt-5-mini'" in message
    fresh = Relay()
    fresh.last.lm = dspy.LM("openai/gpt-5-mini", api_key="mine")
    with caplog.at_level(logging.WARNING, "dspy_fst"):
        loaded = dspy_fst.load(folder, fresh)
        assert not caplog.records
        assert loaded.last.lm is fresh.last.lm
        with dspy.context(lm=dspy.LM("openai/other")):
            assert dspy_fst.load(folder, Relay()).last.lm is None
    assert "predictor last called 'openai/gpt-5-mini' when it was compiled, and now calls 'openai/other'" in caplog.text


@pytest.mark.parametrize("place", ["instructions", "demo", "population"])
def test_a_text_that_holds_a_key_is_not_saved(tmp_path, place):
    program = mixed()
    if place == "instructions":
        program.first.signature = program.first.signature.with_instructions(f"Use {KEY}.")
    elif place == "demo":
        program.first.demos = [{"numbers": "1", "answer": KEY}]
    else:
        program.population = Population.of_seed(type(program.population.best)({"first": KEY, "last": "x"}), 2)
    with pytest.raises(ValueError, match="would hold a secret at ") as caught:
        dspy_fst.save(program, tmp_path / "out")
    assert KEY not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
