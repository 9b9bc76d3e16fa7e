"""What all scripts share: flags and their types, one line for every mistake, and the choice of a device.

torch is imported inside the functions that need it, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import msgspec
from msgspec import Meta

from utils.constants import DATASETS, UserError, checkpoint_stem
from utils.files import locked
from utils.formats import Positive, Seed, Width
from utils.quoting import one_line, shown

if TYPE_CHECKING:
    import torch

    from utils.data import Split

# torchrun sets these for each of the processes that it starts.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class Parser(argparse.ArgumentParser):
    """A script's parser, with the flags that all scripts share. It answers a mistake in one line."""

    def __init__(self, prog: str, description: str, examples: Sequence[str]) -> None:
        command = prog if prog.startswith("python ") else f"python {prog}"
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 80, break_on_hyphens=False),
            epilog="\n".join(["examples:", *(f"  {command} {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--device",
            choices=("auto", "cuda", "mps", "cpu"),
            default="auto",
            help="where to compute (default auto: cuda if available, else mps, else cpu)",
        )
        self.data = self.add_argument_group("data")
        self.data.add_argument(
            "--data-dir",
            type=file_path,
            metavar="FOLDER",
            help="the folder with the data sets; missing ones are downloaded into it (default $DATA_DIR, else data)",
        )

    def add_training_flags(self) -> None:
        """Add the flags that the training of one network and the whole study share."""
        self.add_argument("--quiet", action="store_true", help="print only errors")
        self.data.add_argument(
            "--dataset", choices=DATASETS, default="cifar10", help="the data set to train on (default cifar10)"
        )
        self.network = self.add_argument_group("network")
        self.network.add_argument(
            "--width", type=number(Width), default=32, help="channels of the first convolution (default 32)"
        )
        self.training = self.add_argument_group("training")
        self.training.add_argument(
            "--precision",
            choices=("float32", "bfloat16"),
            default="float32",
            help="number format of the training steps (default float32); bfloat16 takes half the time on GPUs and on "
            "CPUs with AVX512_BF16 or AMX, and several times as long on other CPUs",
        )

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        """The arguments of the command line, after standard output was prepared for names outside ASCII."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is another class, and it may be missing
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().parse_args(*arguments)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process, without a traceback if standard output is a closed pipe or a full disk."""
        try:
            print(end="", flush=True)
        except OSError:  # Python would flush again when it ends, and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line on stderr."""
        # When several processes make the same mistake, rank 0 reports it. The others wait, because torchrun ends all
        # processes as soon as one has ended.
        time.sleep(1 if RANK else 0)
        self.exit(2, None if RANK else f"{self.prog}: error: {message} (--help explains every flag)\n")

    def refuse_many_processes(self) -> None:
        """End the process with an error if torchrun has started several."""
        if WORLD_SIZE > 1:
            self.error("this command runs in one process: torchrun is for train-*.py and test-*.py")


def load_network(path: Path, split: Split, name: str | None = None) -> torch.nn.Module:
    """The network in a checkpoint, on the CPU.

    Raises UserError if it was trained on another data set than the split's, or is not a network of that name.
    """
    from utils.checkpoints import load_checkpoint, read_metadata

    metadata = read_metadata(path)
    if name and metadata.network != name:
        raise UserError(f"{path} holds a {metadata.network}, not a {name}")
    if metadata.dataset != split.dataset:
        raise UserError(f"{path} was trained on {shown(metadata.dataset)}, not on {split.dataset}")
    if metadata.class_names != list(split.class_names):
        raise UserError(f"{path} has other classes than {split.dataset}")
    return load_checkpoint(path)


def default_checkpoint(network: str, dataset: str, epsilon: float | None = None, defense: str = "fgsm-augment") -> Path:
    """The path of a baseline's checkpoint, or, with `epsilon`, of a network trained with a defence."""
    stem = checkpoint_stem(network if dataset == "cifar10" else f"{network}-{dataset}", epsilon, defense)
    return Path("models") / f"{stem}.safetensors"


def default_checkpoints(network: str) -> str:
    """What `--help` says about the default checkpoint."""
    return f"default {default_checkpoint(network, 'cifar10')}, for digits {default_checkpoint(network, 'digits')}"


def epsilon(text: str) -> float:
    """An argparse type: an L-infinity radius of at least 0, as a number or a fraction such as 8/255."""
    numerator, slash, denominator = text.partition("/")
    try:
        value, divisor = float(numerator), float(denominator if slash else 1)
        value = value / divisor if isfinite(divisor) else divisor
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number or a fraction such as 8/255")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative, but a radius is at least 0")
    return value


def training_epsilon(text: str) -> float:
    """An argparse type: an L-infinity radius above 0."""
    value = epsilon(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a radius of 0 changes no image")
    return value


def number(annotation: Any) -> Callable[[str], float]:
    """An argparse type for an annotation with bounds, such as Annotated[int, Meta(ge=0, le=31)]."""
    kind: Any = msgspec.inspect.type_info(annotation)
    kind = getattr(kind, "type", kind)  # a description wraps the type once more
    whole = isinstance(kind, msgspec.inspect.IntType)
    words = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
    limits = [(word, getattr(kind, key)) for key, word in words.items() if getattr(kind, key) is not None]
    bounds = [f"{word} {int(limit) if limit == int(limit) else limit:,}" for word, limit in limits]
    expected = f"a {'whole ' * whole}number that is {' and '.join(bounds)}"

    def parse(text: str) -> float:
        try:
            return msgspec.convert((int if whole else float)(text), annotation)
        except (ValueError, msgspec.ValidationError):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {expected}") from None

    return parse


positive_int = number(Positive)
positive_float = number(Annotated[float, Meta(gt=0, le=1e9)])
seed = number(Seed)


def file_path(text: str) -> Path:
    """An argparse type: a path whose name can be written to files, reports and a terminal."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not in UTF-8") from None
    return Path(text)


def pick_device(name: str) -> torch.device:
    """The device for a value of --device. Raises UserError if this machine does not have it."""
    import torch

    if WORLD_SIZE > 1:
        return device_of_this_process(name)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, does not have it")
    return torch.device(name)


def device_of_this_process(name: str) -> torch.device:
    """The device of one process of several on a machine: each has its own GPU, or all share the CPU."""
    import torch

    count, index = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if name == "mps" or index >= count:
        raise UserError(
            f"each process needs its own GPU and this machine has {count}: use --device cpu, or fewer processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written at `path`. A missing folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        # Under another name: another run may be writing to `path`, or somebody may have put a link there.
        with tempfile.NamedTemporaryFile(prefix=".", suffix=".probe", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def run(parser: Parser, command: Callable[[], None], output: Path | None = None) -> None:
    """Run a command. Errors become one line on stderr: status 2 if the user can mend them, 1 if a disk fails.

    output: a file that no other run may write at the same time. A command may raise KeyboardInterrupt with a text, such
    as "2 epochs are saved", which the line then reports.
    """
    who = f"{parser.prog}, rank {RANK}" if RANK else parser.prog
    # Python's own format adds a line of our source code, which does not help the user.
    warnings.formatwarning = lambda message, *_, **__: f"{who}: warning: {one_line(message)}\n"
    try:
        with locked(output) if output and not RANK else contextlib.nullcontext():
            command()
            print(end="", flush=True)  # a closed pipe shows here, inside the try
    except KeyboardInterrupt as interrupt:
        kept = f": {interrupt}" if str(interrupt) else ""
        parser.exit(130, None if RANK else f"{who}: interrupted{kept}\n")
    except UserError as error:
        parser.exit(2, f"{who}: error: {error}\n")
    except ValueError as error:
        from attacks import AttackError  # not at the top, because it imports torch

        if not isinstance(error, AttackError):
            raise
        parser.exit(2, f"{who}: error: {error}\n")
    except BrokenPipeError:  # the reader of our output, such as head, has ended: end as a shell command would
        parser.exit(128 + 13)
    except OSError as error:
        parser.exit(1, f"{who}: error: {error}\n")
