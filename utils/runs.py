"""Runs: what a training keeps on the disk, how an interrupted one is resumed, and the log that it leaves."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from defenses.losses import Defense
from utils import distributed
from utils.adversarial_sets import AugmentedSplit
from utils.checkpoints import (
    CheckpointError,
    file_digest,
    is_safetensors,
    read_header,
    read_tensors,
    save_checkpoint,
    versions,
    write_tensors,
)
from utils.constants import UserError
from utils.data import Split
from utils.files import beside, locked, read_bytes, remove, temporary_of, write_atomically
from utils.formats import (
    LONGEST_LOG,
    Epoch,
    LogHeader,
    Option,
    RunState,
    TrainingArguments,
    decode,
    decode_lines,
    encode,
    encode_lines,
)
from utils.quoting import one_line, shown
from utils.recipes import MOST_EPOCHS, Recipe
from utils.validation import best_epoch


class TrainingError(UserError):
    """The training cannot start, or cannot go on; the message says why in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a training. saved_epochs: how many epochs this run has finished and saved."""

    def __init__(self, saved_epochs: int) -> None:
        count = {0: "no epoch is", 1: "1 epoch is"}.get(saved_epochs, f"{saved_epochs} epochs are")
        super().__init__(f"{count} saved")
        self.saved_epochs = saved_epochs


# ---- what was asked ----

# Options that were added to the defences later, each with the value that older trainings used.
USUAL_OPTIONS = {"loss": "cross_entropy", "crafting": "training", "smoothing": 0.0}


def training_arguments(
    name: str,
    training: Split | AugmentedSplit,
    recipe: Recipe,
    *,
    width: int,
    seed: int,
    defense: Defense | None = None,
    init: str | Path | None = None,
) -> TrainingArguments:
    """What was asked of a training: stored in its checkpoint, and compared before a run is resumed.

    init: the checkpoint that it starts from; None: random weights.
    Raises TrainingError if an argument is out of its bounds, because the checkpoint could not be loaded.
    """
    if defense:
        recipe = recipe.with_defense()  # a defence is a loss of its own and ignores the recipe's label smoothing
    given: dict[str, Any] = {"network": name, "width": width, "dataset": training.dataset, "examples": len(training)}
    given["init_sha256"] = None if init is None else file_digest(init)
    given |= {"seed": seed, "defense": described(defense) if defense else training.defense}
    try:
        arguments = TrainingArguments(**given, **msgspec.structs.asdict(recipe))
        encode(arguments)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"these training arguments are not valid: {one_line(error)}") from error
    return arguments


def described(defense: Defense) -> str | dict[str, Any]:
    """A defence's name, with its numbers if it has any: the fields of a dataclass or the keywords of a partial.

    A value that is not a number, a text or a list of these is described by the name of its type.
    """
    options: dict[str, Any] = {}
    if isinstance(defense, partial):
        inner = described(defense.func)
        options = (inner if isinstance(inner, dict) else {}) | defense.keywords
        options |= {f"argument {number}": value for number, value in enumerate(defense.args)}
        name = inner if isinstance(inner, str) else inner["name"]
    else:
        name = getattr(defense, "__name__", None) or getattr(defense, "name", None)
        name = name if isinstance(name, str) and name else type(defense).__name__
        if is_dataclass(defense) and not isinstance(defense, type):
            options = {field.name: getattr(defense, field.name) for field in fields(defense)}
    return {**{key: _plain(value) for key, value in options.items()}, "name": name} if options else name


def _plain(value: Any) -> Any:
    if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()  # a number of NumPy or torch
    try:
        return msgspec.convert(value, Option)
    except (msgspec.ValidationError, AttributeError, TypeError, ValueError):
        return type(value).__name__


def check_same_arguments(path: Path, found: TrainingArguments | None, wanted: TrainingArguments) -> None:
    """Raise TrainingError, which names the differences, if the training in `path` was asked for something else."""
    if differences := argument_differences(found, wanted):
        raise TrainingError(f"{path} is of another training: {'; '.join(differences)}")


def argument_differences(found: TrainingArguments | None, wanted: TrainingArguments) -> list[str]:
    """The differences between the arguments of two trainings, a phrase for each. found: None if it is not known."""
    before = msgspec.structs.asdict(found) if found else {}
    after = msgspec.structs.asdict(wanted)
    older, newer = before.get("defense"), after["defense"]
    if isinstance(older, dict) and isinstance(newer, dict):  # older trainings do not name what they could not choose
        before["defense"] = {name: value for name, value in USUAL_OPTIONS.items() if name in newer} | older
    names = [name for name in sorted(TrainingArguments.__struct_fields__) if before.get(name) != after[name]]
    return [f"{name} {shown(before.get(name))}, not {shown(after[name])}" for name in names]


# ---- what is kept ----


@dataclass
class TrainingState:
    """Everything that training steps change. A resumed run needs all of it, and torch's own random state."""

    network: nn.Module
    optimizer: Optimizer
    generator: torch.Generator  # draws the order and the augmentation of the images
    average: AveragedModel | None = None  # of the weights, if the recipe asks for it
    best: nn.Module | None = None  # a copy of the best epoch's weights, if the defence chooses the epoch

    @property
    def current(self) -> nn.Module:
        """The network to validate after an epoch: the moving average if there is one."""
        return self.average.module if self.average else self.network

    @property
    def kept(self) -> nn.Module:
        """The network to keep at the end: that of the best epoch if the defence chooses one."""
        return self.best or self.current

    def tensors(self) -> dict[str, Tensor]:
        """All of the state, by name."""
        tensors = {f"{key}.{name}": t for key, module in self._modules() for name, t in module.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        tensors |= {"generator.batches": self.generator.get_state(), "generator.cpu": torch.get_rng_state()}
        if device_module := _device_module(self.network):
            tensors["generator.device"] = device_module.get_rng_state()
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned. Raises KeyError, RuntimeError, TypeError or ValueError if it differs."""
        for key, module in self._modules():
            module.load_state_dict(_below(f"{key}.", tensors))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            state = _below(f"optimizer.{index}.", tensors)
            if not state:
                raise ValueError("the optimiser's state is missing")
            for key, tensor in state.items():
                # In the parameter's memory layout, as before: another order of operations would round differently.
                like = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
                self.optimizer.state[parameter][key] = like.copy_(tensor)
        self.generator.set_state(tensors["generator.batches"])
        torch.set_rng_state(tensors["generator.cpu"])
        # A run that began on another device goes on, but not bit for bit.
        if (device_module := _device_module(self.network)) and "generator.device" in tensors:
            device_module.set_rng_state(tensors["generator.device"])

    def _modules(self) -> list[tuple[str, nn.Module]]:
        modules = {"network": self.network, "average": self.average, "best": self.best}
        return [(key, module) for key, module in modules.items() if module is not None]


def about_checkpoint(arguments: TrainingArguments, kept: Epoch, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What a checkpoint's header says of the training. kept: the epoch that the weights come from."""
    results = msgspec.structs.asdict(kept)
    about = {name: results[name] for name in results if name == "precision" or name.endswith("_accuracy")}
    about |= {"dataset": arguments.dataset, "class_names": list(class_names), "training": arguments}
    return about | {"epochs": kept.epoch}


class PartialRun:
    """The files of a training beside its output: the state and the log after the last finished epoch."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.log = beside(output, ".jsonl")
        self.state = beside(output, ".partial.safetensors")
        self.partial_log = beside(output, ".partial.jsonl")
        self.saved_epochs = 0

    def exists(self) -> bool:
        """Whether there is an interrupted run."""
        return self.state.exists()

    def header(self) -> RunState:
        """The arguments and the finished epochs of an interrupted run. Raises CheckpointError."""
        return read_header(self.state, RunState)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing these files, or raise UserError. Ctrl-C raises Interrupted."""
        if self.output.is_dir():
            raise TrainingError(f"{self.output} is a folder: choose a file that ends in .safetensors")
        with contextlib.ExitStack() as stack:
            # `net` and `net.safetensors` share their partial files, so they share a lock.
            distributed.from_main(lambda: stack.enter_context(locked(beside(self.output, ".safetensors"))))
            distributed.from_main(self.check_own)
            try:
                yield
            except KeyboardInterrupt as interrupt:
                raise Interrupted(self.saved_epochs) from interrupt

    def check_own(self) -> None:
        """Raise TrainingError if a file that this run would replace or remove was not made by a training.

        A damaged file may be replaced: only the user can tell what it was.
        """
        for path, schema in ((self.state, RunState), (self.log, LogHeader), (self.partial_log, LogHeader)):
            if _is_foreign(path, schema):
                raise TrainingError(f"{path} is not of a training, and this run would replace it: move it")

    def save(self, arguments: TrainingArguments, epochs: list[Epoch], state: TrainingState) -> None:
        """Write what `restore` needs, and the log so far. Each file is written atomically."""
        header = RunState(arguments=arguments, processes=distributed.world_size(), epochs=epochs)
        try:
            write_tensors(self.state, state.tensors(), header, like=self.output)
            self.saved_epochs = len(epochs)
        except KeyboardInterrupt:  # it may come when the file is in its place and nobody has counted it
            if self.exists() and self.header().epochs == epochs:
                self.saved_epochs = len(epochs)
            raise
        self._write_log(self.partial_log, arguments, epochs)

    def restore(self, arguments: TrainingArguments, precision: str, state: TrainingState) -> list[Epoch]:
        """Load the interrupted run into `state`, and return the finished epochs: [] without such a run.

        Raises TrainingError if the run had other arguments, processes or precision, CheckpointError if it is damaged.
        """
        if not distributed.from_main(self.exists):
            return []
        header, tensors = distributed.from_main(partial(self._read_same, arguments, precision))
        try:
            state.load(tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            told = one_line(error)
            raise CheckpointError(f"{self.state} does not hold the state of this training ({told})") from error
        self.saved_epochs = len(header.epochs)
        return header.epochs

    def _read_same(self, arguments: TrainingArguments, precision: str) -> tuple[RunState, dict[str, Tensor]]:
        header, tensors = read_tensors(self.state, RunState)
        check_same_arguments(self.state, header.arguments, arguments)
        processes = distributed.world_size()
        if header.processes != processes:  # other shares of a batch would be normalised otherwise
            begun = f"{self.state} was begun by {header.processes} processes"
            raise TrainingError(f"{begun}: {processes} cannot go on with it")
        for entry in header.epochs[-1:]:
            if entry.precision != precision:
                raise TrainingError(f"{self.state} was begun in {entry.precision}, not in {precision}: --precision")
        return header, tensors

    def finish(
        self, arguments: TrainingArguments, epochs: list[Epoch], state: TrainingState, class_names: tuple[str, ...]
    ) -> None:
        """Write the checkpoint and the log, then remove the partial files."""
        kept = best_epoch(epochs) if state.best else epochs[-1]
        self._write_log(self.log, arguments, epochs)
        save_checkpoint(self.output, state.kept, about_checkpoint(arguments, kept, class_names))
        # The state goes last: as long as it is there, a resumed run comes back here.
        for path in (self.partial_log, self.state):
            remove(temporary_of(path))  # left by a process that was killed in the last epoch
            remove(path)

    def _write_log(self, path: Path, arguments: TrainingArguments, epochs: list[Epoch]) -> None:
        machine = {"processes": distributed.world_size(), "threads": torch.get_num_threads(), "versions": versions()}
        header: dict[str, Any] = msgspec.structs.asdict(arguments) | machine
        write_atomically(path, encode_lines([LogHeader(**header), *epochs]))


def _is_foreign(path: Path, schema: type[RunState] | type[LogHeader]) -> bool:
    """Whether a file is there and intact, but holds something else: a checkpoint in place of a state, or any text."""
    if not path.exists():
        return False
    if issubclass(schema, RunState):
        try:
            read_header(path, schema)
        except CheckpointError:
            return is_safetensors(path, schema)
        return False
    try:
        line, *_ = read_bytes(path, LONGEST_LOG).splitlines() or [b""]
        return bool(line) and not decode(line, schema)
    except (OSError, ValueError):
        return True


def _device_module(network: nn.Module) -> Any:
    """torch.cuda or torch.mps, whose random generator a defence may use; None on the CPU."""
    device = next(network.parameters()).device
    return None if device.type == "cpu" else torch.get_device_module(device)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ---- logs ----


class Log(NamedTuple):
    """A training's log."""

    arguments: LogHeader
    epochs: list[Epoch]  # at least one

    @property
    def seconds(self) -> float:
        """The time of all training steps, without the validation."""
        return sum(epoch.seconds for epoch in self.epochs)


def read_log(path: str | Path, *keys: str) -> Log:
    """The log of a training. keys: fields that every epoch must have. Raises TrainingError if the file is not one."""
    try:
        data = read_bytes(path, LONGEST_LOG)
        if data.count(b"\n") > MOST_EPOCHS + 1:
            raise ValueError(f"it has more than {MOST_EPOCHS:,} epochs")
        arguments, *epochs = decode_lines(data, LogHeader, Epoch)
        if not epochs:
            raise ValueError("it does not hold an epoch")
        if missing := [key for key in keys for epoch in epochs if getattr(epoch, key) is None]:
            raise ValueError(f"an epoch lacks {missing[0]}")
        return Log(arguments, epochs)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is not a training log ({one_line(error)})") from error


def read_epochs(checkpoint: str | Path) -> list[Epoch]:
    """The epochs in the log beside a checkpoint; [] if the log is missing or damaged."""
    try:
        return read_log(beside(checkpoint, ".jsonl")).epochs
    except TrainingError:
        return []
