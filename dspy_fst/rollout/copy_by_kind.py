"""How a copy of one object is made, by its kind. `dspy_fst.rollout.copying` decides which objects are copied."""

import copy
import functools
import gc
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dspy_fst.rollout.program_graph import (
    CONTAINERS,
    attributes,
    copies_itself,
    holds,
    is_live,
    is_object_array,
    is_part,
    is_plain,
    rebuilds_itself,
    state,
)

if TYPE_CHECKING:
    import numpy as np

_ABSENT = object()
_CACHE = type(functools.lru_cache(len))
_WEAK_DICTS: tuple[type, ...] = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)


class Making:
    """One copy of a program in the making. Called with an object, it gives the object's copy, or the object itself.

    Args:
        chosen: id -> object, for every object that is copied. All others are passed by reference.
    """

    def __init__(self, chosen: Mapping[int, object]):
        self._chosen = chosen
        self.memo: dict[int, Any] = {}
        """id of an original -> its copy; `copy.deepcopy` takes it as its memo. Objects may hold each other, so a
        copy is entered here before what it holds is copied, where its kind allows that."""

    def __call__(self, x: Any) -> Any:
        if not self.copies(x):
            return x
        if (existing := self.memo.get(id(x), _ABSENT)) is not _ABSENT:
            return existing
        return self.memo.setdefault(id(x), _maker(x)(x, self))

    def copies(self, x: object) -> bool:
        """Whether the object gets a copy."""
        return id(x) in self._chosen


Maker = Callable[[Any, Making], object]
"""Makes the copy of an object of one kind, over the copies of what it holds."""


def _maker(x: object) -> Maker:
    if is_plain(type(x)) and not (copies_itself(type(x)) and not is_part(x)):
        return _object
    for kinds, maker in _MAKERS:
        if isinstance(x, kinds):
            return maker
    return _object_array if is_object_array(x) else _by_its_own_rule


def can_be_made(x: object) -> bool:
    """Whether a copy of an object that holds a part can be made."""
    if is_part(x):
        return is_plain(type(x))
    if isinstance(x, (*(kind for kinds, _ in _MAKERS for kind in kinds), weakref.ref)):
        return True
    return is_object_array(x) or not is_live(x)


def _object(x: object, inner: Making) -> object:
    kind = type(x)
    base = types.SimpleNamespace if issubclass(kind, types.SimpleNamespace) else object
    new: Any = base.__new__(kind)  # not the class's own __new__, which may want arguments
    inner.memo[id(x)] = new
    values = {name: inner(value) for name, value in state(x).items()}
    if rebuilds_itself(x):
        new.__setstate__(values.get("", values))
    else:
        _fill(new, values)
    return new


def _fill(new: object, values: Mapping[str, object]) -> None:
    """Set attributes as they were, without calling any ``__setattr__``."""
    namespace = getattr(new, "__dict__", None)
    for name, value in values.items():
        if namespace is None or isinstance(getattr(type(new), name, None), types.MemberDescriptorType):
            object.__setattr__(new, name, value)
        else:
            namespace[name] = value


def _list(x: list[object], inner: Making) -> object:
    new: list[object] = [] if type(x) is list else list.__new__(type(x))
    inner.memo[id(x)] = new
    list.extend(new, [inner(value) for value in x])
    return _with_attributes(new, x, inner)


def _dict(x: dict[object, object], inner: Making) -> object:
    new = type(x).__new__(type(x))
    inner.memo[id(x)] = new
    if isinstance(new, defaultdict) and isinstance(x, defaultdict):
        new.default_factory = inner(x.default_factory)
    put = OrderedDict.__setitem__ if isinstance(x, OrderedDict) else dict.__setitem__
    for key, value in list(x.items()):
        put(new, inner(key), inner(value))
    return _with_attributes(new, x, inner)


def _set(x: set[object], inner: Making) -> object:
    new: set[object] = set() if type(x) is set else set.__new__(type(x))
    inner.memo[id(x)] = new
    set.update(new, [inner(value) for value in x])
    return _with_attributes(new, x, inner)


def _deque(x: deque[object], inner: Making) -> object:
    new: deque[object] = deque.__new__(type(x))
    deque.__init__(new, (), x.maxlen)
    inner.memo[id(x)] = new
    deque.extend(new, [inner(value) for value in x])
    return _with_attributes(new, x, inner)


def _fixed(x: tuple[object, ...] | frozenset[object], inner: Making) -> object:
    """A tuple or frozenset. The original itself, if nothing in it was copied."""
    values = [inner(value) for value in x]
    if id(x) in inner.memo:  # it holds something that holds it
        return inner.memo[id(x)]
    has_attributes = type(x) not in (tuple, frozenset) and bool(attributes(x))
    if not has_attributes and all(new is old for new, old in zip(values, x, strict=True)):
        return x
    base: Any = tuple if isinstance(x, tuple) else frozenset
    new = inner.memo[id(x)] = base.__new__(type(x), values)
    return _with_attributes(new, x, inner)


def _with_attributes(new: object, x: object, inner: Making) -> object:
    if type(x) not in CONTAINERS:
        _fill(new, {name: inner(value) for name, value in attributes(x).items()})
    return new


def _method(x: types.MethodType, inner: Making) -> object:
    owner, function = inner(x.__self__), inner(x.__func__)
    same = owner is x.__self__ and function is x.__func__
    return x if same else types.MethodType(function, owner)


def _builtin_method(x: types.BuiltinMethodType, inner: Making) -> object:
    """Such as ``self.seen.append``."""
    owner: object = inner(x.__self__)
    return x if owner is x.__self__ else getattr(owner, x.__name__)


def _partial(x: functools.partial[object], inner: Making) -> object:
    new = type(x)(inner(x.func), *map(inner, x.args), **{name: inner(value) for name, value in x.keywords.items()})
    new.__dict__.update({name: inner(value) for name, value in x.__dict__.items()})
    return new


def _cache(x: Any, inner: Making) -> object:
    """The cache of ``functools.lru_cache`` around a function or method. The copy's cache is empty."""
    return functools.lru_cache(**x.cache_parameters())(inner(x.__wrapped__))


def _function(x: types.FunctionType, inner: Making) -> object:
    """The same code with a closure of its own. Variables of the closure that hold nothing copied stay shared."""
    cells = list(x.__closure__ or ())
    copied = {id(cell) for cell in cells if any(map(inner.copies, gc.get_referents(cell)))}
    closure = tuple(inner.memo.setdefault(id(cell), types.CellType()) if id(cell) in copied else cell for cell in cells)
    new = inner.memo[id(x)] = types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, closure)
    for cell, old in zip(closure, cells, strict=True):
        if cell is not old:
            cell.cell_contents = inner(old.cell_contents)
    new.__defaults__ = x.__defaults__ and tuple(map(inner, x.__defaults__))
    new.__kwdefaults__ = x.__kwdefaults__ and {name: inner(value) for name, value in x.__kwdefaults__.items()}
    new.__dict__.update({name: inner(value) for name, value in x.__dict__.items()})
    new.__annotations__, new.__qualname__, new.__module__ = x.__annotations__, x.__qualname__, x.__module__
    new.__doc__ = x.__doc__
    return new


def _weak(x: weakref.ref[Any], inner: Making) -> object:
    target = inner(x())
    if target is x():
        return x
    return type(x)(target, x.__callback__, x.key) if isinstance(x, weakref.KeyedRef) else type(x)(target)


def _weak_dict(x: Any, inner: Making) -> object:
    """Python's own deepcopy of a weak dictionary would share what it refers to weakly."""
    base: Any = next(kind for kind in _WEAK_DICTS if isinstance(x, kind))
    new: object = object.__new__(type(x))
    inner.memo[id(x)] = new
    base.__init__(new)
    for key, value in list(x.items()):
        base.__setitem__(new, inner(key), inner(value))
    _fill(new, {name: inner(value) for name, value in attributes(x).items() if name not in vars(new)})
    return new


def _proxy(x: types.MappingProxyType[object, object], inner: Making) -> object:
    return types.MappingProxyType({key: inner(value) for key, value in x.items()})


def _object_array(x: "np.ndarray", inner: Making) -> object:
    new = inner.memo[id(x)] = x.copy()
    for index, value in enumerate(x.flat):
        new.flat[index] = inner(value)
    return new


def _by_its_own_rule(x: object, inner: Making) -> object:
    """As Python's deepcopy makes it, over the copies of what it holds, e.g. an iterator over predictors."""
    for _, value in holds(x):
        inner(value)
    return copy.deepcopy(x, inner.memo)


_MAKERS: list[tuple[tuple[type, ...], Maker]] = [
    ((list,), _list),
    ((dict,), _dict),
    ((set,), _set),
    ((tuple, frozenset), _fixed),
    ((deque,), _deque),
    ((types.FunctionType,), _function),
    ((types.MethodType,), _method),
    ((types.BuiltinMethodType,), _builtin_method),
    ((functools.partial,), _partial),
    ((_CACHE,), _cache),
    ((weakref.ref,), _weak),
    (_WEAK_DICTS, _weak_dict),
    ((types.MappingProxyType,), _proxy),
]
