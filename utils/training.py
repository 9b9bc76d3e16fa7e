"""The training loop: one for every network, data set and defence."""

import contextlib
import copy
import json
import math
import sys
import time
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from networks import NETWORKS
from utils import UserError, distributed
from utils.allocator import keep_freed_memory
from utils.checkpoints import (
    CheckpointError,
    read_tensors,
    save_checkpoint,
    temporary_of,
    versions,
    write_atomically,
    write_tensors,
)
from utils.data import training_batches
from utils.defenses import RobustValidation, cross_entropy
from utils.evaluation import accuracy
from utils.interrupts import deferred
from utils.locks import locked
from utils.progress import progress
from utils.recipes import Recipe
from utils.untrusted import (
    LONGEST_OF_OURS,
    check_numbers,
    check_strings,
    check_training,
    one_line,
    read_json_lines,
    reason,
    shown,
)


class TrainingError(UserError):
    """The training cannot go on, or not as asked; the message says why in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, heeded after a step; the message says which."""


def train(
    name,
    training,
    validation,
    recipe,
    *,
    output,
    width=32,
    seed=0,
    device="cpu",
    precision="float32",
    defense=None,
    resume=False,
    quiet=False,
):
    """Train a fresh network of that `name` (a key of NETWORKS) and save it to `output`, a .safetensors file.

    training: Split or AugmentedSplit. validation: Split; nothing is learnt from it, and each epoch's accuracy on it is
        printed and logged. recipe: a Recipe.
    defense: a loss, defense(model, images, labels) -> scalar, with images in [0, 1]; None means cross-entropy with
        the recipe's label smoothing. Of one with an attribute epsilon, the network is also validated under attack, and
        the weights are those of the epoch that withstood it best (RobustValidation); else those of the last.
    precision: of the forward and backward passes; "bfloat16" is torch.autocast's mixed precision, about twice as fast
        on a device that computes in it. Weights, optimiser and validation stay in float32.
    resume: continue an interrupted run, if there is one, from its last finished epoch, to the bit-identical end on
        the same machine's CPU with the same number of threads.

    Of many processes (utils.distributed), all call this alike, and see the batches that one would. Each takes its share
    of a batch, normalises by that share, draws the defence's random numbers itself, and goes on with the mean of all
    gradients, and after each epoch of all statistics (of shares that differ by an image, each counts alike; a last
    batch of fewer images than processes is everybody's). The first alone writes, and says how it goes; the network
    that is returned is the same on all. A run is to be resumed by as many.

    While it runs, `output` is left alone: progress is kept in <stem>.partial.safetensors and <stem>.partial.jsonl
    beside it. At the end the checkpoint is written, the log becomes <stem>.jsonl and the partial files are gone.
    Returns the network in evaluation mode. Raises TrainingError if a run of other arguments, processes or precision is
    there to be resumed, or the loss or the weights are no longer finite, and UserError if another process is at this
    `output`. Ctrl-C raises Interrupted once the step, or what follows an epoch's last step, is done; a second one, and
    any where there are many processes, raises KeyboardInterrupt at once.
    """
    keep_freed_memory()
    quiet = quiet or distributed.rank() > 0
    torch.manual_seed(seed)
    mean, std = training.channel_statistics()
    network = NETWORKS[name](width, len(training.class_names), mean, std)
    network = network.to(device).to(memory_format=torch.channels_last)
    training, validation = training.to(device), validation.to(device)
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.Adam(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    loss_function = defense or partial(cross_entropy, label_smoothing=recipe.label_smoothing)
    mirrored = training.dataset != "digits"  # a mirrored digit is another sign
    augmentation = {"flip": mirrored, "shift": recipe.shift, "contrast": recipe.contrast}

    arguments = training_arguments(name, training, recipe, width=width, seed=seed, defense=defense)
    # What is validated and kept: the network itself or a moving average of it, and of a defended one the best epoch's.
    modules = {"network": network}
    current = network
    if recipe.average:
        average = AveragedModel(network, use_buffers=True)
        average.multi_avg_fn = moving_average(recipe.average, average.n_averaged)
        modules["average"] = average
        current = average.module
    if hasattr(defense, "epsilon"):
        robust_validation = RobustValidation(validation, defense.epsilon)
        modules["best"] = copy.deepcopy(current)
    run = PartialRun(output)
    with contextlib.ExitStack() as held:
        distributed.from_main(lambda: held.enter_context(locked(output)))
        # Of many processes, one that stopped would leave the others waiting for its gradients: torchrun ends them all.
        interrupted = held.enter_context(deferred(distributed.world_size() == 1))
        resume = resume and distributed.from_main(run.exists)
        epochs = run.restore(arguments, modules, optimizer, generator) if resume else []
        if epochs and epochs[-1]["precision"] != precision:
            raise TrainingError(f"{run.state} was begun in {epochs[-1]['precision']}, not in {precision}: --precision")
        steps = -(-len(training) // recipe.batch_size)
        model = distributed.replicated(network)

        for epoch in range(len(epochs) + 1, recipe.epochs + 1):
            start, total_loss, seen, unread = time.perf_counter(), torch.zeros((), device=device), 0, []
            distributed.seed_noise(seed, epoch)
            network.train()
            bar = progress(
                training_batches(training, recipe.batch_size, generator, **augmentation),
                title=f"epoch {epoch}/{recipe.epochs}",
                total=steps,
                unit="step",
                shown=not quiet,
            )
            for step, (images, labels) in enumerate(bar):
                lr = recipe.lr_at((epoch - 1 + step / steps) / recipe.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(training.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    loss = loss_function(model, images, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if recipe.average:
                    average.update_parameters(network)
                total_loss += loss.detach() * len(labels)
                seen += len(labels)
                unread.append((step, lr, loss.detach()))
                if len(unread) == 20 or step == steps - 1:  # seldom, for reading the losses makes a GPU wait
                    check_finite(unread, epoch, steps)
                    unread.clear()
                if interrupted():
                    raise Interrupted(f" after step {step + 1} of {steps} of epoch {epoch}")
                if step % 20 == 0 and not bar.disable:  # likewise
                    bar.set_postfix(loss=f"{loss.item():.3f}", **_last_accuracy(epochs))
            losses, counts = zip(*distributed.gather((total_loss.item(), seen)), strict=True)
            mean_loss = sum(losses) / sum(counts)
            distributed.average_statistics(network)
            if recipe.average:
                distributed.average_statistics(average)
            seconds = time.perf_counter() - start  # the loss has been read, and so a GPU has finished too
            if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
                raise TrainingError(f"the weights became NaN or infinite in epoch {epoch}; a lower --lr may help")
            epochs.append(
                {
                    "epoch": epoch,
                    "loss": mean_loss,
                    "validation_accuracy": accuracy(current, validation),
                    "precision": precision,
                    "seconds": round(seconds, 2),
                    "images_per_second": round(len(training) / seconds),
                }
            )
            if "best" in modules:
                epochs[-1] |= robust_validation(current)
                if robust_validation.best(epochs) is epochs[-1]:
                    modules["best"].load_state_dict(current.state_dict())
                if distributed.rank() == 0 and (warning := robust_validation.collapse(epochs)):
                    print(warning, file=sys.stderr, flush=True)
            distributed.from_main(partial(run.save, arguments, epochs, modules, optimizer, generator))
            if not quiet:
                print(epoch_line(epochs[-1], recipe.epochs), flush=True)
            if interrupted():
                raise Interrupted(f" after epoch {epoch}")

        kept = modules.get("best", current)
        entry = robust_validation.best(epochs) if "best" in modules else epochs[-1]
        distributed.from_main(partial(run.finish, arguments, epochs, entry, kept, training))
        return kept.eval()


def check_finite(losses, epoch, steps):
    """Raise TrainingError at the first loss that is NaN or infinite, naming its step and learning rate.

    losses: (step, learning rate, loss) of some steps of the epoch, read at once. What the steps since then have made of
    the weights is lost with them, and nothing else: only finished epochs are saved.
    """
    values = torch.stack([loss for _, _, loss in losses]).tolist()
    for (step, lr, _), value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {epoch}, step {step + 1} of {steps}, at a learning rate of "
                f"{lr:.4g}; a lower --lr may help"
            )


def epoch_line(entry, of):
    """What is said of an epoch, from its entry in the log."""
    robust = "under PGD {robust_accuracy:.2%}  " if "robust_accuracy" in entry else ""
    line = "epoch {epoch}/{of}  loss {loss:.4f}  validation accuracy {validation_accuracy:.2%}  "
    return (line + robust + "{seconds:.1f} s  {images_per_second:,} images/s").format(of=of, **entry)


def moving_average(decay, count):
    """For AveragedModel: an exponential moving average that starts as the plain mean of the steps so far.

    So the random initial weights leave it as fast as they can, however long it remembers later.
    """

    @torch.no_grad()
    def update(averages, values, _):
        weight = max(1 - decay, 1 / (count.item() + 1))
        for average, value in zip(averages, values, strict=True):
            average.copy_(average.lerp(value, weight) if value.is_floating_point() else value)  # a count is no average

    return update


def training_arguments(name, training, recipe, *, width, seed, defense=None):
    """What was asked of a training: stored in its checkpoint, and compared before a run is resumed."""
    return {
        "network": name,
        "width": width,
        "dataset": training.dataset,
        "examples": len(training),
        "defense": described(defense) if defense else training.defense,
        "seed": seed,
        **asdict(recipe),
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
    later = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
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


def _last_accuracy(epochs):
    return {"validation": f"{epochs[-1]['validation_accuracy']:.1%}"} if epochs else {}
