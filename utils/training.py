"""The training loop: one for every network, data set and defence.

For example, a network that is trained on images under attack:

    splits = load_split("cifar10", "train"), load_split("cifar10", "validation")
    network = train("cnn", *splits, RECIPES["one-cycle"], output="runs/cnn.safetensors", defense=PGD(8 / 255))
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from defenses.losses import Defense, cross_entropy
from networks import NETWORKS
from networks.initialisation import whiten
from utils import distributed
from utils.adversarial_sets import AugmentedSplit
from utils.allocator import keep_freed_memory
from utils.checkpoints import check_saveable, load_checkpoint, read_metadata
from utils.data import Device, Split, training_batches
from utils.evaluation import accuracy
from utils.formats import LARGEST_LOSS, Epoch, Precision
from utils.optimizers import build_optimizer, moving_average
from utils.progress import progress_bar
from utils.recipes import Recipe
from utils.runs import PartialRun, TrainingError, TrainingState, about_checkpoint, training_arguments
from utils.validation import RobustValidation, best_epoch, collapse_warning

# Accuracies that take as many characters in a checkpoint's header as any.
ACCURACIES = dict.fromkeys((name for name in Epoch.__struct_fields__ if name.endswith("_accuracy")), 1 / 3)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of a training that its recipe leaves open; `train` takes them as keywords."""

    width: int = 32  # channels of the first convolution
    seed: int = 0  # of the initial weights, the order of the images and their augmentation
    device: Device = "cpu"
    # The forward and backward passes compute in "float32", or in "bfloat16" through torch.autocast. That is about twice
    # as fast on a device that supports it. Weights, optimiser and what validation counts stay in float32.
    precision: Precision = "float32"
    init: str | Path | None = None  # a checkpoint whose weights the training starts from; None: random weights
    resume: bool = False  # continue an interrupted run, if there is one, after its last finished epoch
    quiet: bool = False  # print warnings only

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)}, not {self.precision!r}")


def train(
    name: str,
    training: Split | AugmentedSplit,
    validation: Split,
    recipe: Recipe,
    *,
    output: str | Path,
    defense: Defense | None = None,
    **settings: Any,
) -> nn.Module:
    """Train a new network and save it to `output`, a .safetensors file. Returns the network in evaluation mode.

    name: a key of NETWORKS.
    training: a Split or AugmentedSplit. validation: a Split; the network does not learn from it.
    defense: a loss, defense(model, images, labels) -> scalar, with images in [0, 1]. None means cross-entropy with the
        recipe's label smoothing. If the defence has an attribute `epsilon`, the network is also validated under attack,
        and the weights of the epoch that withstood it best are kept (utils.validation). Else the last ones are kept.
    settings: the fields of Settings, such as width=8 or seed=1.

    After each epoch, the state of the training is saved to <output>.partial.safetensors and its log to
    <output>.partial.jsonl, without ".safetensors" in <output>. `output` itself stays as it is until the end, when the
    log becomes <output>.jsonl and the partial files are removed. A resumed run ends with the same weights, bit for
    bit, as one that was not interrupted, on the same machine's CPU with the same number of threads.

    When several processes train together (utils.distributed), each makes the same call, takes its share of every batch
    and steps with the mean gradient of all. A last batch with fewer images than processes goes to each of them. Rank 0
    alone writes files and prints. The run must be resumed by as many processes.

    Raises ValueError if the precision or the defence's radius is invalid; TrainingError if another argument is, if the
    loss or the weights are no longer finite, or if the run to resume had other arguments; CheckpointError, before the
    first step, if the network could not be saved and loaded; UserError if `output` is a folder or another process
    writes to it; KeyError for an unknown name, TypeError for an unknown setting; and Interrupted, a KeyboardInterrupt
    that says how many epochs are saved, on Ctrl-C.
    """
    how = Settings(**settings)
    check_images(training, validation)
    asked: dict[str, Any] = {"width": how.width, "seed": how.seed, "init": how.init}
    arguments = training_arguments(name, training, recipe, defense=defense, **asked)
    keep_freed_memory()
    training, validation = training.to(how.device), validation.to(how.device)
    radius = getattr(defense, "epsilon", None)
    state = initial_state(name, training, recipe, how, keep_best=radius is not None)
    longest = Epoch(epoch=recipe.epochs, loss=0, precision="bfloat16", seconds=0, images_per_second=0, **ACCURACIES)
    check_saveable(state.network, about_checkpoint(arguments, longest, training.class_names))
    loss_function = defense or partial(cross_entropy, label_smoothing=recipe.label_smoothing)
    robust_validation = None if radius is None else RobustValidation(validation, radius, how.precision)
    run = PartialRun(output)
    with run.locked():
        epochs = run.restore(arguments, how.precision, state) if how.resume else []
        loss = partial(loss_function, distributed.replicated(state.network))
        for epoch in range(len(epochs) + 1, recipe.epochs + 1):
            distributed.seed_noise(how.seed, epoch)
            measured = train_epoch(epoch, loss, training, recipe, state, how)
            measured["validation_accuracy"] = accuracy(state.current, validation)
            if robust_validation:
                measured |= robust_validation(state.current)
            epochs.append(Epoch(epoch=epoch, precision=how.precision, **measured))
            if state.best and best_epoch(epochs) is epochs[-1]:
                state.best.load_state_dict(state.current.state_dict())
            distributed.from_main(partial(run.save, arguments, epochs, state))
            print_epoch(epochs, recipe.epochs, how.quiet)
        distributed.from_main(partial(run.finish, arguments, epochs, state, training.class_names))
        return state.kept.eval()


def check_images(training: Split | AugmentedSplit, validation: Split) -> None:
    """Raise TrainingError if a split is empty."""
    for images, purpose in ((training, "training"), (validation, "validation")):
        if len(images) == 0:
            raise TrainingError(f"the {purpose} split has no images")


def initial_state(
    name: str, training: Split | AugmentedSplit, recipe: Recipe, how: Settings, *, keep_best: bool
) -> TrainingState:
    """A new network, normalised by the statistics of the training images, and everything that its training changes.

    With how.init, it starts from the weights and the normalisation in that checkpoint.
    """
    torch.manual_seed(how.seed)
    mean, std = training.channel_statistics()
    network = NETWORKS[name](how.width, len(training.class_names), mean, std, activation=recipe.activation)
    if recipe.whitened:
        images, _ = training.take(torch.arange(min(len(training), 4000), device=how.device))
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        whiten(first, network.normalize(images.cpu()))  # type: ignore[operator]
    if how.init is not None:
        start_from(network, how.init)
    network = network.to(how.device).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(how.seed)
    state = TrainingState(network, build_optimizer(network, recipe), generator)
    if recipe.average:
        state.average = moving_average(network, recipe.average)
    if keep_best:
        state.best = copy.deepcopy(state.current)
    return state


def start_from(network: nn.Module, path: str | Path) -> None:
    """Copy the weights in a checkpoint into a network of the same kind and width.

    If the checkpoint's network has another number of classes, the last layer keeps its own weights. Raises
    TrainingError for a network of another kind, width or activation.
    """
    header, found = read_metadata(path), load_checkpoint(path)
    width, activation = header.arguments.width, header.arguments.activation
    asked = network.arguments["width"], network.arguments["activation"]  # type: ignore[index]
    if type(found) is not type(network) or (width, activation) != asked:
        held = f"a {header.network} of width {width} with {activation}"
        raise TrainingError(f"{path} holds {held}, so this training cannot start from it")
    own = network.state_dict()
    same = {name: tensor for name, tensor in found.state_dict().items() if tensor.shape == own[name].shape}
    network.load_state_dict(own | same)


def train_epoch(
    epoch: int,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    training: Split | AugmentedSplit,
    recipe: Recipe,
    state: TrainingState,
    how: Settings,
) -> dict[str, Any]:
    """Train for one pass over the training images. Returns the fields of its Epoch: the mean loss and the speed."""
    start = time.perf_counter()
    steps = math.ceil(len(training) / recipe.batch_size)
    mirrored = training.dataset != "digits"  # a mirrored digit is not a digit
    batches = training_batches(
        training, recipe.batch_size, state.generator, flip=mirrored, shift=recipe.shift, contrast=recipe.contrast
    )
    title, visible = f"epoch {epoch}/{recipe.epochs}", not how.quiet and distributed.rank() == 0
    bar = progress_bar(batches, title=title, total=steps, unit="step", visible=visible)
    total_loss, images_seen, unread = torch.zeros((), device=training.device), 0, []
    state.network.train()
    for step, (images, labels) in enumerate(bar):
        rate = recipe.lr_at((epoch - 1 + step / steps) / recipe.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("relative_lr", 1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=how.precision == "bfloat16"):
            loss = loss_function(images, labels)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        if state.average:
            state.average.update_parameters(state.network)
        total_loss += loss.detach() * len(labels)
        images_seen += len(labels)
        unread.append((step, rate, loss.detach()))
        if len(unread) == 20 or step == steps - 1:  # reading a loss makes the CPU wait for a GPU, so twenty at once
            last_loss = check_losses(unread, epoch, steps)
            bar.set_postfix(loss=f"{last_loss:.3f}")
            unread.clear()
    losses, counts = zip(*distributed.gather((total_loss.item(), images_seen)), strict=True)
    for module in filter(None, (state.network, state.average)):
        distributed.average_statistics(module)
    seconds = max(time.perf_counter() - start, 0.001)  # a clock may stand still or be set back
    mean_loss = sum(losses) / sum(counts)
    check_epoch(epoch, mean_loss, state.network)
    return {"loss": mean_loss, "seconds": round(seconds, 2), "images_per_second": round(len(training) / seconds)}


def check_losses(losses: list[tuple[int, float, Tensor]], epoch: int, steps: int) -> float:
    """The last of the losses. Raises TrainingError at the first that is NaN or infinite, with its step and rate.

    losses: (step, learning rate, loss) of some steps of the epoch. The weights that later steps made of such a loss are
    dropped, because only finished epochs are saved.
    """
    values = torch.stack([loss for _, _, loss in losses]).tolist()
    for (step, rate, _), value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {epoch}, step {step + 1} of {steps}, at a learning rate of "
                f"{rate:.4g}; a lower --lr may help"
            )
    return values[-1]


def check_epoch(epoch: int, mean_loss: float, network: nn.Module) -> None:
    """Raise TrainingError if the mean loss of an epoch is too large for the log, or if a weight is not finite."""
    if not abs(mean_loss) <= LARGEST_LOSS:
        raise TrainingError(
            f"the mean loss of epoch {epoch} became {mean_loss:.4g}, beyond {LARGEST_LOSS:g}; a lower --lr may help"
        )
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise TrainingError(f"the weights became NaN or infinite in epoch {epoch}; a lower --lr may help")


def print_epoch(epochs: list[Epoch], total: int, quiet: bool) -> None:
    """Print the last epoch, out of `total`, and a warning if catastrophic overfitting began in it; on rank 0 only."""
    if distributed.rank() > 0:
        return
    last = epochs[-1]
    if warning := collapse_warning(epochs):
        print(warning, file=sys.stderr, flush=True)
    if not quiet:
        robust = "" if last.robust_accuracy is None else f"under PGD {last.robust_accuracy:.2%}  "
        print(
            f"epoch {last.epoch}/{total}  loss {last.loss:.4f}  validation accuracy {last.validation_accuracy:.2%}  "
            f"{robust}{last.seconds:.1f} s  {last.images_per_second:,} images/s",
            flush=True,
        )
