"""How a copy of one object is made, by its kind. The program's copier decides about each thing that it holds."""

import copy
import functools
import gc
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

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

_ABSENT = object()
_CACHE = type(functools.lru_cache(len))
_WEAK_DICTS: tuple[Any, ...] = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)


class Making:
    """One copy of a program in the making: an object -> its copy, or itself where it is passed by reference.

    Args:
        chosen: id -> object, for all that is copied.
    """

    def __init__(self, chosen: Mapping[int, Any]):
        self._chosen = chosen
        self.memo: dict[int, Any] = {}
        """id of an original -> its copy, also what `copy.deepcopy` takes as its memo. A copy stands here before what it
        holds is copied, where its kind allows: objects may hold each other."""

    def __call__(self, x: Any) -> Any:
        if not self.copies(x):
            return x
        if (made := self.memo.get(id(x), _ABSENT)) is not _ABSENT:
            return made
        return self.memo.setdefault(id(x), _maker(x)(x, self))

    def copies(self, x: Any) -> bool:
        return id(x) in self._chosen


def _maker(x: Any) -> Callable[[Any, Making], Any]:
    if is_plain(type(x)) and not (copies_itself(type(x)) and not is_part(x)):
        return _object
    for kinds, maker in _MAKERS:
        if isinstance(x, kinds):
            return maker
    return _object_array if is_object_array(x) else _by_its_own_rule


def can_be_made(x: Any) -> bool:
    """Whether a copy of an object that holds a part can be made."""
    if is_part(x):
        return is_plain(type(x))
    if isinstance(x, (*(kind for kinds, _ in _MAKERS for kind in kinds), weakref.ref)):
        return True
    return is_object_array(x) or not is_live(x)


def _object(x: Any, inner: Making) -> Any:
    kind = type(x)
    base = types.SimpleNamespace if issubclass(kind, types.SimpleNamespace) else object
    new = inner.memo[id(x)] = base.__new__(kind)  # not the class's own __new__, which may want arguments
    values = {name: inner(value) for name, value in state(x).items()}
    if rebuilds_itself(x):
        new.__setstate__(values.get("", values))
    else:
        _fill(new, values)
    return new


def _fill(new: Any, values: dict[str, Any]) -> None:
    """Set attributes as they were, past every ``__setattr__``."""
    own = getattr(new, "__dict__", None)
    for name, value in values.items():
        if own is None or isinstance(getattr(type(new), name, None), types.MemberDescriptorType):
            object.__setattr__(new, name, value)
        else:
            own[name] = value


def _list(x: list[Any], inner: Making) -> Any:
    new: list[Any] = [] if type(x) is list else list.__new__(type(x))
    inner.memo[id(x)] = new
    list.extend(new, [inner(value) for value in x])
    return _with_attributes(new, x, inner)


def _dict(x: Any, inner: Making) -> Any:
    kind: Any = type(x)
    new: Any = kind.__new__(kind)
    inner.memo[id(x)] = new
    if hasattr(type(x), "default_factory"):
        new.default_factory = inner(x.default_factory)
    put = OrderedDict.__setitem__ if isinstance(x, OrderedDict) else dict.__setitem__
    for key, value in list(x.items()):
        put(new, inner(key), inner(value))
    return _with_attributes(new, x, inner)


def _set(x: set[Any], inner: Making) -> Any:
    new: set[Any] = set() if type(x) is set else set.__new__(type(x))
    inner.memo[id(x)] = new
    set.update(new, [inner(value) for value in x])
    return _with_attributes(new, x, inner)


def _deque(x: deque[Any], inner: Making) -> Any:
    new: deque[Any] = deque.__new__(type(x))
    deque.__init__(new, (), x.maxlen)
    inner.memo[id(x)] = new
    deque.extend(new, [inner(value) for value in x])
    return _with_attributes(new, x, inner)


def _fixed(x: Any, inner: Making) -> Any:
    """A tuple or frozenset: the very one where nothing in it was copied."""
    values = [inner(value) for value in x]
    if id(x) in inner.memo:  # it holds something that holds it
        return inner.memo[id(x)]
    own = attributes(x) if type(x) not in (tuple, frozenset) else {}
    if not own and all(new is old for new, old in zip(values, x, strict=True)):
        return x
    base = tuple if isinstance(x, tuple) else frozenset
    new = inner.memo[id(x)] = base.__new__(type(x), values)
    return _with_attributes(new, x, inner)


def _with_attributes(new: Any, x: Any, inner: Making) -> Any:
    if type(x) not in CONTAINERS:
        _fill(new, {name: inner(value) for name, value in attributes(x).items()})
    return new


def _method(x: types.MethodType, inner: Making) -> Any:
    owner, function = inner(x.__self__), inner(x.__func__)
    same = owner is x.__self__ and function is x.__func__
    return x if same else types.MethodType(function, owner)


def _builtin_method(x: Any, inner: Making) -> Any:
    """Such as ``self.seen.append``."""
    owner = inner(x.__self__)
    return x if owner is x.__self__ else getattr(owner, x.__name__)


def _partial(x: functools.partial[Any], inner: Making) -> Any:
    new = type(x)(inner(x.func), *map(inner, x.args), **{name: inner(value) for name, value in x.keywords.items()})
    new.__dict__.update({name: inner(value) for name, value in x.__dict__.items()})
    return new


def _cache(x: Any, inner: Making) -> Any:
    """``functools.lru_cache`` round a function or method; the copy's cache is empty."""
    return functools.lru_cache(**x.cache_parameters())(inner(x.__wrapped__))


def _function(x: types.FunctionType, inner: Making) -> Any:
    """The same code over a closure of its own. What the closure holds that is not copied stays one variable for all."""
    cells = list(x.__closure__ or ())
    own = {id(cell): gc.get_referents(cell) for cell in cells if any(map(inner.copies, gc.get_referents(cell)))}
    made = tuple(inner.memo.setdefault(id(cell), types.CellType()) if id(cell) in own else cell for cell in cells)
    new = inner.memo[id(x)] = types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, made)
    for cell, old in zip(made, cells, strict=True):
        if cell is not old:
            cell.cell_contents = inner(old.cell_contents)
    new.__defaults__ = x.__defaults__ and tuple(map(inner, x.__defaults__))
    new.__kwdefaults__ = x.__kwdefaults__ and {name: inner(value) for name, value in x.__kwdefaults__.items()}
    new.__dict__.update({name: inner(value) for name, value in x.__dict__.items()})
    new.__annotations__, new.__qualname__, new.__module__ = x.__annotations__, x.__qualname__, x.__module__
    new.__doc__ = x.__doc__
    return new


def _weak(x: Any, inner: Making) -> Any:
    target = inner(x())
    if target is x():
        return x
    return type(x)(target, x.__callback__, x.key) if isinstance(x, weakref.KeyedRef) else type(x)(target)


def _weak_dict(x: Any, inner: Making) -> Any:
    """Python's own deepcopy of these shares what they refer to weakly."""
    base = next(kind for kind in _WEAK_DICTS if isinstance(x, kind))
    new: Any = object.__new__(type(x))
    inner.memo[id(x)] = new
    base.__init__(new)
    for key, value in list(x.items()):
        base.__setitem__(new, inner(key), inner(value))
    _fill(new, {name: inner(value) for name, value in attributes(x).items() if name not in vars(new)})
    return new


def _proxy(x: Any, inner: Making) -> Any:
    return types.MappingProxyType({key: inner(value) for key, value in x.items()})


def _object_array(x: Any, inner: Making) -> Any:
    new = inner.memo[id(x)] = x.copy()
    for index, value in enumerate(x.flat):
        new.flat[index] = inner(value)
    return new


def _by_its_own_rule(x: Any, inner: Making) -> Any:
    """As Python's deepcopy makes it, over the copies of what it holds: an iterator over predictors, say."""
    for _, value in holds(x):
        inner(value)
    return copy.deepcopy(x, inner.memo)


_MAKERS: list[tuple[tuple[Any, ...], Any]] = [
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
