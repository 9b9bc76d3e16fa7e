"""The modules that a call of a model reaches, including those that `model.modules()` does not list."""

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice

from torch import Tensor, nn

LEVELS = 3  # how many functions, objects and containers may lie between the model and a module
LARGEST = 1000  # items of a list or dict that are looked at

_EVERY_MODULE = vars(nn.Module()).keys()  # attributes that cannot hold a module that modules() does not list
_PLAIN = frozenset((type(None), bool, int, float, str, bytes, Tensor, nn.Parameter))  # types of what holds nothing
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def modules_of(model: object) -> list[nn.Module]:
    """Every module that a call of the model can be seen to reach, each once.

    Besides model.modules(), these are modules in closures, default arguments and the globals that a function names,
    behind bound methods and functools.partial, in attributes and hooks, and in lists, tuples, sets and dicts, through
    up to LEVELS such steps. A module that the call makes anew, or looks up by a computed name, is not found.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # with the objects, because the id of a deleted one may be given to another
    waiting: deque[tuple[object, int]] = deque([(model, 0)])
    while waiting:
        holder, level = waiting.popleft()
        if id(holder) in seen:
            continue
        seen[id(holder)] = holder
        if isinstance(holder, nn.Module):
            for module in holder.modules():
                if id(module) not in found:
                    found[id(module)] = seen[id(module)] = module
                    waiting.extend((part, 1) for part in _held_by_module(module))
        elif level <= LEVELS:
            waiting.extend((part, level + 1) for part in _held(holder))
    return list(found.values())


def _held_by_module(module: nn.Module) -> list[object]:
    """What a module can call or look up and modules() does not list."""
    attributes = vars(module)
    held = [hook for kind in _HOOKS if attributes.get(kind) for hook in attributes[kind].values()]
    if not is_of_torch(type(module)):
        held += [attributes[name] for name in attributes.keys() - _EVERY_MODULE]
        held.append(type(module).forward)
    elif "forward" in attributes:  # torch's own modules register whatever else they call
        held.append(attributes["forward"])
    return [part for part in held if type(part) not in _PLAIN]


def _held(holder: object) -> Iterable[object]:
    """What an object that is not a module can call or look up."""
    if type(holder) in _PLAIN or isinstance(holder, (Tensor, type, types.ModuleType)):
        return ()
    if isinstance(holder, types.MethodType):
        return holder.__self__, holder.__func__
    if isinstance(holder, functools.partial):
        return holder.func, *holder.args, *holder.keywords.values()
    if isinstance(holder, types.FunctionType):
        return _named_by(holder)
    if isinstance(holder, weakref.ref):
        return (holder(),)
    if isinstance(holder, Mapping):
        return islice(holder.values(), LARGEST)
    if isinstance(holder, (list, tuple, set, frozenset, deque)):
        return islice(holder, LARGEST)
    slots = (name for kind in type(holder).__mro__ for name in vars(kind).get("__slots__", ()))
    attributes = [*getattr(holder, "__dict__", {}).values(), *(getattr(holder, name, None) for name in slots)]
    calls = [vars(kind)["__call__"] for kind in type(holder).__mro__ if "__call__" in vars(kind)]
    return [*attributes, *(call for call in calls if isinstance(call, types.FunctionType))]


def _named_by(function: types.FunctionType) -> Iterable[object]:
    """The values that a function's closure and default arguments hold, and the callables that it names as globals."""
    yield from vars(function).values()  # __wrapped__, say
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # its variable has no value yet
            continue
    if not is_of_torch(function):
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            is_container = isinstance(value, (list, tuple, dict))
            if is_container or (callable(value) and not isinstance(value, type)):
                yield value


def _names(code: types.CodeType) -> set[str]:
    """The names that a function and the functions inside it look up."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def is_of_torch(thing: type | types.FunctionType) -> bool:
    """Whether torch defines this class or function."""
    return (thing.__module__ or "").startswith("torch.")
