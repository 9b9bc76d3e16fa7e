"""The command line: arguments, start-up checks and output of the train, test and study scripts.

Torch is imported where it is first needed, so that `--help` and mistakes are answered at once.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from math import isfinite
from pathlib import Path

from utils.constants import DATASETS, LARGEST_WIDTH, UserError, checkpoint_stem
from utils.files import locked
from utils.quoting import one_line, shown

LARGEST_NUMBER = 10**9  # of epochs, images, steps; a learning rate


LARGEST_INT = 2**63 - 1  # torch's integers have 64 bits


RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started


WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many those are


class Parser(argparse.ArgumentParser):
    """A script's parser, with the flags that all scripts share; a mistake is answered in one line."""

    def __init__(self, script, description, examples):
        super().__init__(
            prog=script,
            description=description,
            epilog="\n".join(["examples:", *(f"  python {script} {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--data-dir",
            type=file_path,
            metavar="FOLDER",
            help="holds the data sets, downloaded into it on first use (default $DATA_DIR, else data)",
        )
        self.add_argument(
            "--device",
            choices=("auto", "cuda", "mps", "cpu"),
            default="auto",
            help="default auto: the first there is of cuda, mps, cpu",
        )

    def add_training_flags(self):
        """What whoever trains may set, one network or the whole study."""
        self.add_argument("--dataset", choices=DATASETS, default="cifar10", help="what to train on (default cifar10)")
        self.add_argument(
            "--width", type=width, default=32, help="channels of the first convolution (default 32, the study's)"
        )
        self.add_argument(
            "--precision",
            choices=("float32", "bfloat16"),
            default="float32",
            help="of the training steps (default float32); bfloat16 halves their time on GPUs and on CPUs that compute "
            "in it (AVX512_BF16, AMX), and multiplies it on others",
        )
        self.add_argument("--quiet", action="store_true", help="print errors alone")

    def parse_args(self, *arguments):  # type: ignore[override]
        if isinstance(sys.stdout, io.TextIOWrapper):  # it may be none, or of a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal of ASCII cannot show
        return super().parse_args(*arguments)

    def exit(self, status=0, message=None):
        try:
            print(end="", flush=True)
        except OSError:  # a closed pipe, a full disk: Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        super().exit(status, message)

    def error(self, message):
        # Of many processes all make the same mistake: one says so, before another's end has torchrun end it.
        time.sleep(1 if RANK else 0)
        self.exit(2, None if RANK else f"{self.prog}: error: {message} (--help explains every flag)\n")

    def refuse_many_processes(self):
        if WORLD_SIZE > 1:
            self.error("torchrun is for train-*.py and test-*.py, this is for one process")


def load_network(path, split, name=None):
    """A checkpoint's network, on the CPU. Raises UserError unless it fits the split, and the name if any."""
    from utils.checkpoints import load_checkpoint, read_metadata

    metadata = read_metadata(path)
    if name and metadata["network"] != name:
        raise UserError(f"{path} holds a {metadata['network']}, not a {name}")
    if metadata["dataset"] != split.dataset:
        raise UserError(f"{path} was trained on {shown(metadata['dataset'])}, not on {split.dataset}")
    if metadata["class_names"] != list(split.class_names):
        raise UserError(f"{path} tells other classes apart than {split.dataset} has")
    return load_checkpoint(path)


def default_checkpoint(network, dataset, epsilon=None, defense="fgsm-augment"):
    """Where a network is kept that was trained on clean images, or with a defence at `epsilon`."""
    stem = checkpoint_stem(network if dataset == "cifar10" else f"{network}-{dataset}", epsilon, defense)
    return Path("models") / f"{stem}.safetensors"


def default_checkpoints(network):
    """What `--help` says of the default."""
    return f"default {default_checkpoint(network, 'cifar10')}, for digits {default_checkpoint(network, 'digits')}"


def epsilon(text):
    """An L-infinity radius: a decimal number or a fraction such as 8/255, at least 0."""
    numerator, slash, denominator = text.partition("/")
    try:
        value, divisor = float(numerator), float(denominator if slash else 1)
        value = value / divisor if isfinite(divisor) else divisor
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number and no fraction such as 8/255")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative, and a radius is not")
    return value


def radius(text):
    """An epsilon to train with, and so above 0."""
    value = epsilon(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a radius of 0 changes no image")
    return value


def positive_float(text):
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, and at most {LARGEST_NUMBER:,}")
    return value


def weight_decay(text):
    return 0.0 if text == "0" else positive_float(text)


def fraction(text):
    value = 0.0 if text == "0" else positive_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def contrast(text):
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1, which is an image's own contrast")
    return value


def whole_number(low, high):
    """An argparse type: a whole number from low to high."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return value

    return parse


positive_int = whole_number(1, LARGEST_NUMBER)


seed = whole_number(0, LARGEST_INT)


shift = whole_number(0, 31)  # a larger one would reflect an image more than once


width = whole_number(1, LARGEST_WIDTH)


def file_path(text):
    """A path, of whose name files, reports and a terminal can speak."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not in UTF-8") from None
    return Path(text)


def pick_device(name):
    import torch

    if WORLD_SIZE > 1:
        return device_of_this_process(name)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


def device_of_this_process(name):
    """Of many processes on a machine, each has a GPU of its own, or all share the CPU."""
    import torch

    count, index = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if name == "mps" or index >= count:
        raise UserError(f"each process needs a GPU and this machine has {count}: --device cpu, or fewer processes")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_writable(path):
    """Raise UserError unless a file can be made at `path`; its folder is made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is there and no file")
        # Not under the name to which another run may be writing, nor through a link that somebody left there.
        with tempfile.NamedTemporaryFile(prefix=".", suffix=".probe", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def run(parser, command, hint="", output=None):
    """Run a command; one line on stderr and status 2 for what the user can mend, 1 for a failing disk.

    output: a file that no other run may write meanwhile, if there is one.
    """
    who = f"{parser.prog}, rank {RANK}" if RANK else parser.prog
    # Without a line of our code, which says little to whoever did not write it.
    warnings.formatwarning = lambda message, *_, **__: f"{who}: warning: {one_line(message)}\n"
    try:
        with locked(output) if output and not RANK else contextlib.nullcontext():
            command()
            print(end="", flush=True)  # here, where a closed pipe is answered
    except KeyboardInterrupt as interrupt:
        parser.exit(130, None if RANK else f"{who}: interrupted{interrupt}{hint}\n")
    except UserError as error:
        parser.exit(2, f"{who}: error: {error}\n")
    except ValueError as error:
        from attacks import AttackError  # not above, for it takes torch

        if not isinstance(error, AttackError):
            raise
        parser.exit(2, f"{who}: error: {error}\n")
    except BrokenPipeError:  # whoever read the output, such as head, has gone: so do we, as a shell would have it
        parser.exit(128 + 13)
    except OSError as error:
        parser.exit(1, f"{who}: error: {error}\n")
