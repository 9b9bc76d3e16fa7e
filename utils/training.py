"""The training loop: one for every network, data set and defence."""

import contextlib
import copy
import math
import sys
import time
from functools import partial

import torch
from torch.optim.swa_utils import AveragedModel

from defenses.losses import cross_entropy
from networks import NETWORKS
from utils import distributed
from utils.allocator import keep_freed_memory
from utils.data import training_batches
from utils.evaluation import accuracy
from utils.files import locked
from utils.interrupts import deferred
from utils.optimizers import moving_average
from utils.progress import progress_bar
from utils.runs import Interrupted, PartialRun, TrainingError, training_arguments
from utils.validation import RobustValidation


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
            bar = progress_bar(
                training_batches(training, recipe.batch_size, generator, **augmentation),
                title=f"epoch {epoch}/{recipe.epochs}",
                total=steps,
                unit="step",
                visible=not quiet,
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


def _last_accuracy(epochs):
    return {"validation": f"{epochs[-1]['validation_accuracy']:.1%}"} if epochs else {}
