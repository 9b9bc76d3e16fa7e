"""What is inside a model: fresh copies of it, and the network behind a defence.

The adapted attack on a defence is often simple: attack the network inside, or let the gradient skip the step that has
no useful one (BPDA, Athalye et al., 2018, arXiv:1802.00420, section 4.1). This file finds what such attacks need.
"""

import contextlib
import copy
import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from attacks.core import Model, attacking, logits_of
from attacks.modules import LARGEST, is_of_torch, modules_of

MOST_NETWORKS = 3  # inside one model


def fresh(model: Model) -> Model:
    """A copy of a model that shares no state with it: its modules, attributes, closure and bound object are copied.

    Modules that a function finds by their global name are copied too.

    Raises an error of any kind if something inside cannot be copied.
    """
    if isinstance(model, functools.partial):
        return functools.partial(fresh(model.func), *copy.deepcopy(model.args), **copy.deepcopy(model.keywords))
    if not isinstance(model, types.FunctionType):
        copied_model = _deep_copy(model, {})
        for part in copied_model.modules() if isinstance(copied_model, nn.Module) else ():
            for name, value in vars(part).items():
                if isinstance(value, types.FunctionType):  # deepcopy shares functions, and what they enclose
                    setattr(part, name, fresh(value))
        return copied_model
    memo: dict[int, Any] = {}  # what two cells share stays shared

    def copied(value: Any) -> Any:
        return fresh(value) if isinstance(value, types.FunctionType) else _deep_copy(value, memo)

    cells = tuple(types.CellType(copied(cell.cell_contents)) for cell in model.__closure__ or ())
    defaults = tuple(map(copied, model.__defaults__ or ())) or None
    networks = {name: model.__globals__.get(name) for name in model.__code__.co_names}
    own = {name: copied(value) for name, value in networks.items() if isinstance(value, nn.Module)}
    return types.FunctionType(model.__code__, model.__globals__ | own, model.__name__, defaults, cells)


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """copy.deepcopy, with a copy of the network inside for each module that torch.compile has made.

    The code of such a module cannot be copied.
    """
    for module in modules_of(value):
        if "_orig_mod" in module._modules:
            memo[id(module)] = copy.deepcopy(module._modules["_orig_mod"], memo)
    return copy.deepcopy(value, memo)


def shared_state(model: Model) -> object:
    """What copies of a model share and a query may change: an object that is equal to a later one if nothing changed.

    These are the numbers, tensors and containers in attributes of classes, and in the globals that their functions or
    the model itself name. State outside the process, such as a file, is not seen.
    """
    kinds = {kind for module in [model, *modules_of(model)] for kind in type(module).__mro__ if not is_of_torch(kind)}
    attributes = [value for kind in kinds for value in vars(kind).items()]
    functions = [inspect.unwrap(value) for _, value in attributes if isinstance(value, types.FunctionType)]
    functions += [model] if isinstance(model, types.FunctionType) else []
    named = [(name, f.__globals__.get(name)) for f in functions for name in f.__code__.co_names]
    return sorted((name, repr(_summary(value))) for name, value in attributes + named if not name.startswith("__"))


def _summary(value: object, levels: int = 3) -> object:
    """What tells a state from a later one; None if the value is not a state."""
    if isinstance(value, Tensor):
        return tuple(value.shape), float(value.detach().double().sum())
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, deque)):
        return len(value), [_summary(item, levels - 1) for item in islice(value, LARGEST)] if levels else None
    return None


def freeze(model: Model) -> None:
    """Put all modules inside a model into evaluation mode, for good, and freeze their parameters."""
    for module in modules_of(model):
        module.training = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def networks_inside(
    model: Model, images: Tensor, labels: Tensor, *, recognises_attacks: bool = False
) -> Sequence[Model]:
    """The modules inside a model that classify images by themselves, at most three, the most accurate first.

    images: float (N, C, H, W) in [0, 1]; labels: int64 (N,). Such a module returns as many logits as the model, and is
    at least 0.7 times as accurate on these images. A module with the model's own logits and gradient is left out.
    If the model recognises attacks, such a module stays, because it gives an attack other answers than the model does.
    The model should be a copy: the modules in it are called alone.
    """
    logits, gradient = _answer(model, images)
    found: list[tuple[float, nn.Module]] = []
    known: list[tuple[Tensor, Tensor | None]] = [] if recognises_attacks else [(logits, gradient)]
    for module in modules_of(model):
        if module is model:
            continue
        try:
            answer = _answer(module, images)
        except Exception:  # most modules expect something else than images
            continue
        if answer[0].shape != logits.shape or any(_same(answer, other) for other in known):
            continue
        known.append(answer)
        right, least = (float((each.argmax(1) == labels).float().mean()) for each in (answer[0], logits))
        if right >= 0.7 * least and right > 0:
            found.append((right, module))
    return [module for _, module in sorted(found, key=lambda pair: -pair[0])][:MOST_NETWORKS]


def _answer(model: Model, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and the gradient of their weighted sum with respect to the images; None if it is missing."""
    inputs = images.clone().requires_grad_()
    with attacking(model, images.device):
        logits = logits_of(model, inputs)
        weights = torch.linspace(-1, 1, logits.shape[1]).to(logits)
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad((logits * weights).sum(), inputs, allow_unused=True)
    return logits.detach(), gradient


def _same(first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]) -> bool:
    (logits, gradient), (others, other) = first, second
    if not torch.allclose(logits, others, rtol=1e-3, atol=1e-4):
        return False
    return gradient is not None and other is not None and torch.allclose(gradient, other, rtol=1e-2, atol=1e-4)


def place_after_preprocessing(model: Model, images: Tensor, *, any_change: bool = False) -> int | None:
    """The module that first receives changed images: its place in `modules_of`, or None.

    images: float (N, C, H, W) in [0, 1]. The module's input has their shape and is not just the images scaled and
    moved in each channel, which normalisation does. any_change: the first module of such a shape counts in any case.
    """
    inside = modules_of(model)
    places: list[int] = []

    def look(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            received = inputs[0] if inputs else None
            if not isinstance(received, Tensor) or received.shape != images.shape or inside[place] is model:
                return
            if any_change or not _normalised(images, received.detach()):
                places.append(place)

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for place, module in enumerate(inside):
            stack.callback(module.register_forward_pre_hook(look(place)).remove)
        model(images.clone())
    return places[0] if places else None


def _normalised(images: Tensor, received: Tensor) -> bool:
    """Whether each channel is a straight line of the images' channel."""
    given, found = (each.transpose(0, 1).flatten(1).double() for each in (images, received))
    given, found = (each - each.mean(1, keepdim=True) for each in (given, found))
    slope = (given * found).sum(1, keepdim=True) / (given**2).sum(1, keepdim=True).clamp_min(1e-12)
    scale = found.abs().amax().clamp_min(1e-12)
    return bool(((found - slope * given).abs().amax() / scale) < 1e-4)


class StraightThrough:
    """A model whose gradient skips its preprocessing, and whatever changes the logits of the network inside.

    Backward pass differentiable approximation with the identity (Athalye et al., 2018, section 4.1): the forward pass
    is the model's, but the module `place` (see `place_after_preprocessing`) passes its gradient to the images as if it
    had received them. If that module returns logits, these are returned in the place of the model's.
    """

    def __init__(self, model: Model, place: int) -> None:
        self.model, self.module = model, modules_of(model)[place]

    def __call__(self, images: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            received = inputs[0]
            # An inner optimisation differentiates with respect to a leaf of its own: that stays.
            own_leaf = received.is_leaf and received.requires_grad
            if received.shape != images.shape or own_leaf:
                return None
            return (images + (received - images).detach()).to(received.dtype), *inputs[1:]

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            caught.append(output)

        with self._hooked(enter, leave):
            logits = logits_of(self.model, images)
        last = caught[-1] if caught else logits
        return last if isinstance(last, Tensor) and last.shape == logits.shape else logits

    @contextlib.contextmanager
    def _hooked(self, enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
        first, second = self.module.register_forward_pre_hook(enter), self.module.register_forward_hook(leave)
        try:
            yield
        finally:
            first.remove()
            second.remove()


class Mean:
    """The mean of several models' logits, or of several passes of one: the gradient is that of the expectation.

    Over random passes, this is expectation over transformation (Athalye et al., 2018, section 4.2).
    """

    def __init__(self, models: list[Model]) -> None:
        self.models = models

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([logits_of(model, images) for model in self.models]).mean(0)


class Renewed:
    """A model that forgets: each pass is the first pass of a fresh copy."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        return fresh(self.model)(images)
