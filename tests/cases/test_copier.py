"""The copier on programs of any shape: it shares no predictor, copies no data, and what is held once stays one."""

import asyncio
import contextvars
import functools
import gc
import logging
import random
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass

import dspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.rollout.copy_faults import copy_faults
from dspy_fst.rollout.copying import SMALL, Copier, copied
from dspy_fst.rollout.program_graph import ProgramGraph, hidden_predictors
from dspy_fst.types import Candidate

Pair = namedtuple("Pair", "left right")


class Plain:
    def __init__(self, **held):
        self.__dict__.update(held)


class Slotted:
    __slots__ = ("_inner", "lock")

    def __init__(self, inner):
        self._inner, self.lock = inner, threading.Lock()


class Node(dspy.Module):
    """A module that holds whatever it is given."""

    def __init__(self, **held):
        super().__init__()
        self.__dict__.update(held)

    def method(self, x=None):
        return self


class Counted(dict):
    """A dict with an attribute of its own."""


def in_counted(x):
    holder = Counted(a=x)
    holder.note = x
    return holder


def in_closure(x):
    return lambda: x


WRAPS = {
    "list": lambda x: [x, threading.Lock()],
    "dict": lambda x: {"a": x, "lock": threading.Lock()},
    "key": lambda x: {x: 1} if isinstance(x, dspy.Module) else {"k": x},
    "tuple": lambda x: (x, threading.Lock()),
    "set": lambda x: {x} if isinstance(x, dspy.Module) else [x],
    "frozenset": lambda x: frozenset([x]) if isinstance(x, dspy.Module) else (x,),
    "deque": lambda x: deque([x], maxlen=3),
    "ordered": lambda x: OrderedDict(a=x),
    "defaultdict": lambda x: defaultdict(list, a=x),
    "namedtuple": lambda x: Pair(x, 1),
    "subclass": in_counted,
    "object": lambda x: Plain(inner=x, lock=threading.Lock(), notes=[]),
    "slots": Slotted,
    "namespace": lambda x: types.SimpleNamespace(x=x),
    "module": lambda x: Node(inner=x, lock=threading.Lock()),
    "closure": in_closure,
    "partial": lambda x: functools.partial(print, x),
    "method": lambda x: Node(inner=x).method,
    "tool": lambda x: dspy.Tool(Node(inner=x).method, name="t", desc="d", args={}),
    "weak": lambda x: (x, weakref.ref(x)) if isinstance(x, dspy.Module) else (x,),
    "array": lambda x: np.array([x, None], dtype=object),
    "proxy": lambda x: types.MappingProxyType({"a": x}),
}


def built(predictors, wraps, itself):
    """A program of a shape, and the predictors and the data that were put into it."""
    asks = [dspy.Predict("question -> answer") for _ in range(predictors)]
    data = [np.ones(8), threading.Lock(), [str(n) for n in range(SMALL + 1)]]
    held = list(asks)
    for index, (wrap, place) in enumerate(wraps):
        held.append(WRAPS[wrap](held[place % len(held)]))
        if index % 3 == 2:
            held.append(Node(shared=held[-2], data=data[index % len(data)]))
    program = Node(**{f"h{index}": x for index, x in enumerate(held)}, data=list(data))
    if itself:
        program.itself = [program, program.method]
    for part in ProgramGraph(program).parts().values():
        part.__dict__.setdefault("parent", program)
    return program, asks, data


SHAPES = st.lists(st.tuples(st.sampled_from(sorted(WRAPS)), st.integers(0, 20)), min_size=1, max_size=8)


def reachable(root):
    """Every object that the garbage collector finds from a module on, by id; classes, LMs and code left out."""
    found, front = {}, [root]
    left_out = (type, types.ModuleType, types.BuiltinFunctionType, dspy.BaseLM, weakref.ref)
    while front:
        x = front.pop()
        if id(x) in found or isinstance(x, left_out) or (isinstance(x, dict) and "__builtins__" in x):
            continue
        found[id(x)] = x
        front += list(x.flat) if isinstance(x, np.ndarray) and x.dtype.hasobject else gc.get_referents(x)
    return found


@pytest.mark.slow
@given(st.integers(1, 3), SHAPES, st.booleans())
def test_random_programs(predictors, wraps, itself):
    program, asks, data = built(predictors, wraps, itself)
    before = {place: dict(part.__dict__) for place, part in ProgramGraph(program).parts().items()}
    copy = copied(program)
    there, here = reachable(program), reachable(copy)
    modules = {key for key, x in there.items() if isinstance(x, dspy.Module)}
    assert not modules & here.keys()
    assert sum(isinstance(x, dspy.Predict) for x in here.values()) == len(asks)
    assert all(id(x) in here for x in data)
    assert sum(isinstance(x, np.ndarray) and not x.dtype.hasobject for x in here.values()) == 1
    assert list(ProgramGraph(copy).parts()) == list(before)
    assert {place: dict(part.__dict__) for place, part in ProgramGraph(program).parts().items()} == before


def test_what_a_rollout_changes_in_a_predictor_is_its_own():
    program = Node(ask=dspy.Predict("question -> answer", temperature=0.5))
    program.ask.demos = [dspy.Example(question=str(n), answer=str(n)) for n in range(2 * SMALL)]
    program.ask.traces, program.history = [1], [2]
    copies = [Copier(program).copy() for _ in range(2)]
    copies[0].ask.demos.append("x")
    copies[0].ask.config["temperature"] = 1.0
    copies[0].ask.traces.append(3)
    copies[0].ask.signature = copies[0].ask.signature.with_instructions("other")
    for untouched in (program, copies[1]):
        assert len(untouched.ask.demos) == 2 * SMALL
        assert untouched.ask.config == {"temperature": 0.5}
        assert untouched.ask.traces == [1]
        assert untouched.ask.signature.instructions != "other"
    assert copies[1].ask.demos[0] is program.ask.demos[0]
    assert program.history == [2]
    assert copies[1].history == []


class Memory:
    """It says how it is copied: with a lock of its own."""

    def __init__(self):
        self.items, self.lock = [], threading.Lock()

    def __getstate__(self):
        return {"items": self.items}

    def __setstate__(self, state):
        self.items, self.lock = state["items"], threading.Lock()


class Ends:
    """It ends something when it is collected."""

    def __init__(self):
        self.notes = []

    def __del__(self):
        self.notes.append("ended")


def test_small_values_are_each_copy_s_own_and_what_stands_for_the_outside_is_shared():
    client = Plain(lock=threading.Lock(), log=[])
    basket = Plain(items=[])
    program = Node(
        ask=dspy.Predict("question -> answer"),
        seen=set(),
        counts=defaultdict(int),
        rng=random.Random(7),
        numpy_rng=np.random.default_rng(7),
        memory=Memory(),
        ends=Ends(),
        client=client,
        log=client.log,
        shop=Plain(basket=[], client=client),
        limit=threading.Semaphore(4),
        wait=threading.Barrier(2).wait,
        basket=basket,
        search=dspy.Tool(basket.items.append, name="add", desc="d", args={}),
        corpus={str(n): n for n in range(SMALL)},
        small={str(n): n for n in range(10)},
    )
    copy = Copier(program).copy()
    own = ("seen", "counts", "rng", "numpy_rng", "memory", "basket", "search", "small")
    shared = ("ends", "client", "log", "corpus", "shop", "limit", "wait")
    assert [name for name in own if getattr(copy, name) is getattr(program, name)] == []
    assert [name for name in shared if getattr(copy, name) is not getattr(program, name)] == []
    assert copy.rng.random() == program.rng.random()
    assert copy.numpy_rng.random() == program.numpy_rng.random()
    copy.search.func("bread")
    assert copy.basket.items == ["bread"]
    assert basket.items == []
    copy.memory.items.append(1)
    assert program.memory.items == []
    assert copy.memory.lock is not program.memory.lock


def test_variables_of_a_closure_without_predictors_stay_one_for_all():
    count = 0
    program = Node(ask=dspy.Predict("question -> answer"))

    def forward(question):
        nonlocal count
        count += 1
        return program.ask

    program.forward = forward
    copies = [copied(program) for _ in range(3)]
    assert [copy.forward("x") is copy.ask for copy in copies] == [True] * 3
    assert count == 3


def test_an_optimizer_s_records_are_no_part_of_a_program():
    program = Node(ask=dspy.Predict("question -> answer"))
    program.candidate_programs = [{"score": 1.0, "program": Node(ask=dspy.Predict("question -> answer"))}]
    copy = copied(program)
    assert copy.candidate_programs is program.candidate_programs
    assert list(ProgramGraph(program).parts()) == ["", "ask"]
    assert Candidate({}).texts == {}


class Deep(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask, self.data = dspy.Predict("question -> answer"), np.ones(8)


def test_a_module_copied_while_a_rollout_runs_shares_its_data_too():
    program = Node(module=Deep())
    lean = Copier(program).copy(lean=True)
    inner = lean.module.deepcopy()
    assert inner.data is program.module.data
    assert inner.ask is not lean.module.ask
    assert "deepcopy" not in Copier(program).copy().module.__dict__


class Rows(list):
    """Counts how often somebody goes through it."""

    walks = 0

    def __iter__(self):
        Rows.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("around", [dspy.BestOfN, dspy.Refine])
def test_a_try_of_a_module_walks_through_no_data(around):
    rows = Rows({"row": str(n)} for n in range(2 * SMALL))
    inner = Node(ask=dspy.Predict("question -> answer"), data=rows, notes=[])
    program = Node(module=around(Node(inner=inner), N=3, reward_fn=lambda *_: 1.0, threshold=1.0))
    copier = Copier(program)
    lean = copier.copy(lean=True)
    lean.module.deepcopy()
    Rows.walks = 0
    lean = copier.copy(lean=True)
    tries = [lean.module.module.deepcopy() for _ in range(3)]
    again = [one.inner.deepcopy() for one in tries]
    assert Rows.walks == 0
    notes = [lean.module.module.inner.notes, *(one.inner.notes for one in tries), *(one.notes for one in again)]
    asks = [lean.module.module.inner.ask, *(one.inner.ask for one in tries), *(one.ask for one in again)]
    assert len(set(map(id, notes))) == len(set(map(id, asks))) == 7
    assert all(one.inner.data is rows for one in tries)


def test_what_a_rollout_has_put_into_a_part_is_copied_for_each_of_its_tries():
    program = Node(module=Node(ask=dspy.Predict("question -> answer"), notes=[]))
    lean = Copier(program).copy(lean=True)
    lean.module.more, lean.module.notes = [dspy.Predict("question -> answer")], ["seen"]
    one, other = lean.module.deepcopy(), lean.module.deepcopy()
    assert len({id(x.more[0]) for x in (one, other, lean.module)}) == 3
    assert len({id(x.notes) for x in (one, other, lean.module)}) == 3
    assert one.notes == ["seen"]


class Remembering(logging.Handler):
    """A handler of the process that holds a predictor, as a monitor of somebody's does."""

    def __init__(self):
        super().__init__()
        self.p = dspy.Predict("question -> answer")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "process",
    [
        lambda: logging.getLogger("of.a.program"),
        lambda: logging.LoggerAdapter(logging.getLogger("of.a.program"), {}),
        lambda: logging.getLogger().handlers[-1],
    ],
    ids=["logger", "adapter", "handler"],
)
def test_a_logger_leads_out_of_the_program(process, nested):
    handler = Remembering()
    logging.getLogger().addHandler(handler)
    try:
        log = process()
        program = Node(ask=dspy.Predict("question -> answer"), log=[Plain(log=log)] if nested else log)
        assert hidden_predictors(program) == {}
        assert copy_faults(program) == []
        twin = copied(program)
        assert (twin.log[0].log if nested else twin.log) is log
    finally:
        logging.getLogger().removeHandler(handler)


def test_an_event_loop_and_a_context_lead_out_of_the_program():
    ask, loop = dspy.Predict("question -> answer"), asyncio.new_event_loop()
    variable = contextvars.ContextVar("variable")
    variable.set(ask)
    loop.call_later(3600, print, ask)
    program = Node(loop=loop, context=contextvars.copy_context(), variable=variable)
    try:
        assert ProgramGraph(program).parts().keys() == {""}
        assert copied(program).loop is loop
    finally:
        loop.close()


@dataclass(frozen=True, slots=True)
class Frozen:
    """Python gives such a class ``__getstate__`` and ``__setstate__``."""

    ask: object
    lock: object


def test_a_frozen_dataclass_with_slots_is_copied_beside_its_lock():
    ask = dspy.Predict("question -> answer")
    program = Node(ask=ask, held=[Frozen(ask, threading.Lock())], lone=Frozen("words", threading.Lock()))
    assert copy_faults(program) == []
    twin = copied(program)
    assert twin.held[0].ask is twin.ask is not ask
    assert twin.held[0].lock is program.held[0].lock
    assert twin.lone is program.lone  # it holds a lock and no part


class Registry(weakref.WeakValueDictionary):
    note = ""


def test_weak_dictionaries_refer_to_the_copy_s_own():
    ask, gone = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
    program = Node(ask=ask, values=Registry({"a": ask, "b": gone}), keys=weakref.WeakKeyDictionary({ask: [ask]}))
    program.values.note = "kept"
    del gone
    gc.collect()
    assert copy_faults(program) == []
    twin = copied(program)
    assert dict(twin.values) == {"a": twin.ask}
    assert twin.values.note == "kept"
    assert dict(twin.keys) == {twin.ask: [twin.ask]}
    assert twin.ask is not ask
    del twin.ask, twin.keys
    gc.collect()
    assert not dict(twin.values)


class Sharing:
    def __init__(self, ask):
        self.ask = ask

    def __deepcopy__(self, memo):
        return self


def test_a_helper_whose_own_copies_share_a_predictor_is_named():
    ask = dspy.Predict("question -> answer")
    (fault,) = copy_faults(Node(ask=ask, helpers=[Sharing(ask)]))
    assert "shares ask with it, because the copying method (__deepcopy__, __copy__ or __reduce__)" in fault
    assert "of helpers[0] (class Sharing)" in fault
