"""Attached servers that are of no use, or do not see what the run writes, are found out before anything is loaded."""

import pytest

from dspy_fst.engine.vllm.served.dspy_fst_weight_check import WeightCheck
from dspy_fst.errors import ConfigurationError
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.training.attached import attached_server_faults
from programs.lab import BASE
from tests.relay import relay
from tests.test_compile import compile_relay

RPC = "/collective_rpc"


def on(*urls):
    return PolicyLM(BASE, engine="vllm", engine_options={"attach_url": list(urls)}, max_tokens=8)


def test_a_worker_sees_a_file_only_with_the_content_that_was_written(tmp_path):
    worker, file = WeightCheck(), tmp_path / "probe"
    assert not worker.dspy_fst_sees(str(file), "one")
    file.write_text("one")
    assert worker.dspy_fst_sees(str(file), "one")
    assert not worker.dspy_fst_sees(str(file), "two"), "another disk under the same path"
    assert not worker.dspy_fst_sees(str(tmp_path), "one")


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [
        (200, {"results": [True, True]}, False),
        (200, {"results": [True, False]}, True),
        (500, {"error": {"message": "Method 'dspy_fst_sees' is not implemented."}}, False),
        (404, {}, False),
    ],
    ids=["sees it", "one worker does not", "without the extension", "without developer endpoints"],
)
def test_a_server_is_asked_for_a_file_beside_the_weights_that_is_removed_again(canned, tmp_path, status, answer, told):
    canned.replies[RPC] = (status, answer)
    faults = attached_server_faults(on(canned.url), tmp_path / "runs" / "new")
    ((_, asked),) = [call for call in canned.asked if call[0] == RPC]
    assert asked["kwargs"]["file"].startswith(f"{tmp_path}/.dspy-fst-probe-")
    assert list(tmp_path.iterdir()) == []
    assert bool(faults) == told
    if told:
        assert f"the vLLM server at {canned.url} does not see {tmp_path}, " in faults[0]
        assert "name a run_dir on storage that both machines mount" in faults[0]


def test_each_of_several_servers_is_asked_and_what_is_wrong_with_any_is_told_at_once(canned, tmp_path):
    canned.replies[RPC] = (200, {"results": [False]})
    silent, blind = attached_server_faults(on("http://127.0.0.1:9", canned.url), tmp_path)
    assert "the vLLM server at http://127.0.0.1:9 does not answer" in silent
    assert f"{canned.url} does not see" in blind
    assert attached_server_faults(PolicyLM(BASE, engine="in_process"), tmp_path) == []
    sent = on(canned.url)
    sent.handle.options["weight_transfer"] = "nccl"
    assert attached_server_faults(sent, tmp_path) == [], "it reads nothing there"


def test_a_run_is_refused_before_it_leaves_anything_behind(canned, tmp_path):
    canned.replies[RPC] = (200, {"results": [False]})
    program = relay("vllm")
    policy_of(program).handle.options["attach_url"] = canned.url
    with pytest.raises(ConfigurationError, match="does not see"):
        compile_relay(tmp_path / "run", program=program)
    assert not (tmp_path / "run").exists()
