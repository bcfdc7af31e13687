"""A version of the weights that is a base and LoRA adapters on it."""

from pathlib import Path

import pytest

from dspy_fst.engine.base import AdapterFiles, Checkpoint, Holding
from dspy_fst.engine.verification import verify_identity
from dspy_fst.errors import DiskError, SyncError

HOPS = AdapterFiles("hops", Path("weights/step-000001/hops"), {"q.lora_A.weight": "a1"})
ANSWER = AdapterFiles("answer", Path("weights/step-000001/answer"), {"q.lora_A.weight": "b1"})
BASE = {"q.weight": "w"}


def of(*adapters: AdapterFiles, digests=BASE) -> Checkpoint:
    return Checkpoint("step-000001", Path("weights/base"), digests, adapters)


def test_the_only_adapter_is_the_one_that_a_call_goes_through():
    assert of(HOPS).adapter(None) is HOPS
    assert of(HOPS, ANSWER).adapter(None) is None  # which one is for the caller to say
    assert of().adapter(None) is None
    assert of(HOPS, ANSWER).adapter("answer") is ANSWER
    with pytest.raises(ValueError, match=r"no LoRA adapter 'judge'; they have \['hops', 'answer'\]"):
        of(HOPS, ANSWER).adapter("judge")


def test_the_folder_that_names_a_version_is_the_adapters_parent():
    assert of(HOPS).folder == Path("weights/step-000001")
    assert of().folder == Path("weights/base")


WHOLE = {**BASE, "hops: q.lora_A.weight": "a1", "answer: q.lora_A.weight": "b1"}


def test_base_and_adapters_are_compared_with_what_their_writer_held():
    verify_identity(Holding(WHOLE, {}, "float32"), of(HOPS, ANSWER))
    for name in WHOLE:
        with pytest.raises(DiskError, match=rf"{name.replace('.', '[.]')} \(its bytes differ\)"):
            verify_identity(Holding({**WHOLE, name: "other"}, {}, "float32"), of(HOPS, ANSWER))
    with pytest.raises(DiskError, match=r"hops: q.lora_B.weight \(nobody wrote it"):
        verify_identity(Holding({**WHOLE, "hops: q.lora_B.weight": "a2"}, {}, "float32"), of(HOPS, ANSWER))
    with pytest.raises(DiskError, match=r"answer: q.lora_A.weight \(missing"):
        verify_identity(Holding({n: d for n, d in WHOLE.items() if "answer" not in n}, {}, "float32"), of(HOPS, ANSWER))


def test_a_base_that_was_compared_before_is_left_out():
    adapters = {name: digest for name, digest in WHOLE.items() if name not in BASE}
    verify_identity(Holding(adapters, {}, "float32", with_base=False), of(HOPS, ANSWER))
    with pytest.raises(DiskError, match=r"q.weight \(missing\)"):
        verify_identity(Holding(adapters, {}, "float32"), of(HOPS, ANSWER))


def test_parts_whose_writer_recorded_nothing_are_compared_with_the_engine_alone():
    unrecorded = AdapterFiles("hops", HOPS.path)
    verify_identity(Holding(WHOLE, {}, "float32"), of(unrecorded, ANSWER, digests={}))
    with pytest.raises(DiskError, match=r"answer: q.lora_A.weight"):
        verify_identity(
            Holding({**WHOLE, "answer: q.lora_A.weight": "x"}, {}, "float32"), of(unrecorded, ANSWER, digests={})
        )
    with pytest.raises(SyncError, match=r"hops: q.lora_A.weight"):
        verify_identity(Holding(WHOLE, {"hops: q.lora_A.weight": "3 of 9 numbers"}, "float32"), of(unrecorded, ANSWER))
