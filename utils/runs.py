"""TODO: utils.runs."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import msgspec
import torch

from utils import distributed
from utils.checkpoints import CheckpointError, read_tensors, save_checkpoint, versions, write_tensors
from utils.constants import UserError
from utils.files import temporary_of, write_atomically
from utils.formats import LONGEST_OF_OURS, check_numbers, check_strings, check_training, read_json_lines
from utils.quoting import one_line, reason, shown
from utils.recipes import Recipe


class TrainingError(UserError):
    """The training cannot go on, or not as asked; the message says why in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, heeded after a step; the message says which."""


def training_arguments(name, training, recipe, *, width, seed, defense=None):
    """What was asked of a training: stored in its checkpoint, and compared before a run is resumed."""
    return {
        "network": name,
        "width": width,
        "dataset": training.dataset,
        "examples": len(training),
        "defense": described(defense) if defense else training.defense,
        "seed": seed,
        **msgspec.structs.asdict(recipe),
    }


def described(defense):
    """A defence's name and numbers; of a plain function, its name."""
    return defense.__name__ if hasattr(defense, "__name__") else {"name": defense.name, **asdict(defense)}


class PartialRun:
    """What an unfinished training keeps beside its output: its state after the last finished epoch, and its log."""

    def __init__(self, output):
        self.output = Path(output)
        self.log = self.output.with_suffix(".jsonl")
        self.state = self.output.with_suffix(".partial.safetensors")
        self.partial_log = self.output.with_suffix(".partial.jsonl")

    def exists(self):
        return self.state.exists()

    def save(self, arguments, epochs, modules, optimizer, generator):
        tensors = {
            f"{key}.{name}": tensor for key, module in modules.items() for name, tensor in module.state_dict().items()
        }
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        tensors |= {"generator.batches": generator.get_state(), "generator.cpu": torch.get_rng_state()}
        if device_module := _device_module(modules["network"]):
            tensors["generator.device"] = device_module.get_rng_state()
        about = {"arguments": arguments, "processes": distributed.world_size(), "epochs": epochs}
        write_tensors(self.state, tensors, about)
        self._write_log(self.partial_log, arguments, epochs)

    def restore(self, arguments, modules, optimizer, generator):
        """Put modules, optimiser and generators where the run left them; returns the finished epochs' log entries."""
        metadata, tensors = distributed.from_main(partial(self._read, arguments))
        try:
            epochs = metadata["epochs"]
            _ = [(entry["precision"], entry["validation_accuracy"]) for entry in epochs]
            self._restore(tensors, modules, optimizer, generator)
            return epochs
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            told = one_line(error)
            raise CheckpointError(f"{self.state} does not hold the state of this training ({told})") from error

    def _read(self, arguments):
        metadata, tensors = read_tensors(self.state, longest=LONGEST_OF_OURS)
        check_same_arguments(self.state, metadata.get("arguments"), arguments)
        begun, processes = metadata.get("processes", 1), distributed.world_size()
        if begun != processes:  # which would normalise by other shares
            raise TrainingError(f"{self.state} was begun by {shown(begun)} processes: {processes} cannot go on with it")
        return metadata, tensors

    def _restore(self, tensors, modules, optimizer, generator):
        for key, module in modules.items():
            module.load_state_dict(_below(f"{key}.", tensors))
        network = modules["network"]
        for index, parameter in enumerate(network.parameters()):
            state = _below(f"optimizer.{index}.", tensors)
            if not state:
                raise ValueError("no optimiser state")
            for key, tensor in state.items():
                # In the parameter's memory layout, as before: another order of operations would round differently.
                like = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
                optimizer.state[parameter][key] = like.copy_(tensor)
        generator.set_state(tensors["generator.batches"])
        torch.set_rng_state(tensors["generator.cpu"])
        # A run that was begun on another device goes on, but not bit for bit.
        if (device_module := _device_module(network)) and "generator.device" in tensors:
            device_module.set_rng_state(tensors["generator.device"])

    def finish(self, arguments, epochs, kept, network, training):
        """Write the checkpoint and the log. kept: the entry of the epoch that the network is of."""
        metadata = {
            "dataset": training.dataset,
            "class_names": training.class_names,
            "training": arguments,
            "epochs": kept["epoch"],
            **{name: value for name, value in kept.items() if name == "precision" or name.endswith("_accuracy")},
        }
        self._write_log(self.log, arguments, epochs)
        save_checkpoint(self.output, network, metadata)
        for path in (self.partial_log, self.state):  # the state last: as long as it is there --resume comes back here
            temporary_of(path).unlink(missing_ok=True)  # of a writer that was killed in the last epoch
            path.unlink(missing_ok=True)

    def _write_log(self, path, arguments, epochs):
        machine = {"processes": distributed.world_size(), "threads": torch.get_num_threads(), "versions": versions()}
        first = {**arguments, **machine}
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in [first, *epochs]).encode())


def read_log(path, *keys):
    """A training's log: its arguments, and then an entry for each epoch, with those keys too.

    Raises TrainingError if the file is none.
    """
    try:
        log = read_json_lines(path)
        _ = log[0]["network"], log[0]["width"], log[0]["defense"]
        check_training(log[0])
        if len(log) < 2:
            raise ValueError("it has no epoch")
        for entry in log[1:]:
            check_numbers((entry["epoch"], entry["seconds"]), 0, 1e9)
            check_numbers([entry["loss"]], -1e9, 1e9)
            check_strings([entry.get("precision", "float32")])
            accuracies = [value for name, value in entry.items() if name.endswith("_accuracy")]
            check_numbers([*(entry[key] for key in ("validation_accuracy", *keys)), *accuracies], 0, 1)
        return log
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} is no log of such a training ({reason(error)})") from error


def check_same_arguments(path, found, wanted):
    """Raise TrainingError, naming what differs, unless a run was started with the same arguments."""
    if differences := argument_differences(found, wanted):
        raise TrainingError(f"{path} is of another training: {'; '.join(differences)}")


def argument_differences(found, wanted):
    """What differs between the arguments of two trainings, a phrase each."""
    # The fields of a recipe that have a default came later: what was trained before was trained with it.
    later = {field.name: field.default for field in msgspec.structs.fields(Recipe) if not field.required}
    found = {**later, **found} if isinstance(found, dict) else {}
    defenses = [arguments.get("defense") for arguments in (found, wanted)]
    if all(isinstance(defense, dict) for defense in defenses) and "crafting" in defenses[1]:  # likewise
        found["defense"] = {"crafting": "training", **defenses[0]}
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    phrases = [f"{one_line(name)[:50]} {shown(found.get(name))}, not {shown(wanted.get(name))}" for name in names[:20]]
    return phrases + [f"and {len(names) - 20} more"] * (len(names) > 20)


def _device_module(network):
    """torch.cuda or torch.mps, whose generator a defence may draw from; None on the CPU."""
    device = next(network.parameters()).device
    return None if device.type == "cpu" else torch.get_device_module(device)


def _below(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_epochs(path):
    """The epochs in the log beside a checkpoint; none if there is no log, or none of ours."""
    try:
        epochs = read_json_lines(Path(path).with_suffix(".jsonl"), longest=LONGEST_OF_OURS)[1:]
        return [epoch for epoch in epochs if {"seconds", "images_per_second"} <= epoch.keys()]
    except (OSError, ValueError, AttributeError):
        return []
