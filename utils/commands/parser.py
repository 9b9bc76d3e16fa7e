"""What all commands share: flags, one line for every mistake, and the choice of a device.

torch is imported inside the functions that need it, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from utils.commands import types
from utils.constants import DATASETS, UserError
from utils.files import locked, make_folder
from utils.formats import Precision
from utils.quoting import one_line, printable, shown

if TYPE_CHECKING:
    import torch

# What torchrun sets for each of the processes that it starts; Parser refuses other values.
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


def is_number(text: str) -> bool:
    """Whether a text of the environment is a whole number of a usual size."""
    return text.isdecimal() and len(text) < 10


WORLD_SIZE, RANK = (
    int(value) if is_number(value := os.environ.get(name, "")) else default
    for name, default in (("WORLD_SIZE", 1), ("RANK", 0))
)
RANK = RANK if WORLD_SIZE > 1 else 0
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EINVAL)  # errors of a path, not of a disk


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help whose lines do not end inside a name such as fgsm-augment, with "N ..." for one value or more."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """A script's parser, with the flags that all scripts share. It answers a mistake in one line."""

    def __init__(self, prog: str, description: str, examples: Sequence[str]) -> None:
        command = prog if prog.startswith("python ") else f"python {prog}"
        super().__init__(
            prog=prog,
            usage=f"{command} [flags]",
            description=textwrap.fill(description, 80, break_on_hyphens=False),
            epilog="\n".join(["examples:", *(f"  {command} {example}".rstrip() for example in examples)]),
            formatter_class=partial(HelpFormatter, max_help_position=22),
            add_help=False,
        )
        # In the order of `--help`, which leaves out the groups without a flag.
        titles = ("data", "network", "training", "defence", "attack", "output")
        self.groups = {title: self.add_argument_group(title) for title in titles}
        self.groups["output"].add_argument("-h", "--help", action="help", help="show this help")
        self.add("data", "--data-dir", types.file_path, "for the data sets (default $DATA_DIR, else data)")
        text = "cuda, mps, cpu or auto (default): the fastest here"
        self.add("network", "--device", ("auto", "cuda", "mps", "cpu"), text, default="auto")

    def add(self, title: str, flag: str, kind: Callable[[str], Any] | Sequence[str], text: str, **options: Any) -> None:
        """Add a flag with a value to a group of flags. kind: the value's type for argparse, or the choices."""
        how = {"type": kind} if callable(kind) else {"choices": kind}
        metavar = "PATH" if kind is types.file_path else "N" if callable(kind) and kind is not str else "NAME"
        self.groups[title].add_argument(flag, help=text, metavar=metavar, **how, **options)

    def add_switch(self, flag: str, text: str) -> None:
        """Add a flag without a value to the last group of flags."""
        self.groups["output"].add_argument(flag, action="store_true", help=text)

    def add_training_flags(self) -> None:
        """Add the flags that the training of one network and the whole study share."""
        self.add_switch("--quiet", "print only errors")
        self.add("data", "--dataset", DATASETS, "the training images: cifar10 (default) or digits", default="cifar10")
        self.add("network", "--width", types.width, "channels of the first convolution (default 32)", default=32)
        text = "float32 (default), or bfloat16: fast on some machines"
        self.add("training", "--precision", get_args(Precision), text, default="float32")

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        """The arguments of the command line, after standard output was prepared for names outside ASCII."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is another class, and it may be missing
            sys.stdout.reconfigure(errors="backslashreplace")
        self._check_torchrun()
        try:
            os.getcwd()
        except OSError:
            self.error("the working folder does not exist any more: change to another one")
        return super().parse_args(*arguments)

    def _check_torchrun(self) -> None:
        """End the process with an error if the environment holds what torchrun never sets."""
        values = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
        for name in TORCHRUN[:-1]:
            number = values.get(name, "1")
            if not is_number(number) or (name == "WORLD_SIZE" and not int(number)):
                self.error(f"{name} is {shown(number)} in the environment, but torchrun sets a number: unset {name}")
        if WORLD_SIZE > 1 and (missing := [name for name in TORCHRUN if not values.get(name)]):
            self.error(f"WORLD_SIZE is {WORLD_SIZE} in the environment without {missing[0]}: unset it, or use torchrun")
        if WORLD_SIZE > 1 and not RANK < WORLD_SIZE:
            self.error(
                f"RANK is {RANK} in the environment, but WORLD_SIZE is {WORLD_SIZE}: unset both, or use torchrun"
            )

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
        silent = 0 < RANK < WORLD_SIZE
        time.sleep(1 if silent else 0)
        self.exit(2, None if silent else f"{self.prog}: error: {printable(message)} (--help explains every flag)\n")

    def refuse_many_processes(self) -> None:
        """End the process with an error if torchrun has started several."""
        if WORLD_SIZE > 1:
            self.error("this command runs in one process: torchrun is for train-*.py and test-*.py")


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
        make_folder(path.parent)
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        # Under another name: another run may be writing to `path`, or somebody may have put a link there.
        with tempfile.NamedTemporaryFile(prefix=".", suffix=".probe", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[], None],
    output: Path | None = None,
    *,
    batch_size: int | None = None,
) -> None:
    """Run a command. Errors become one line on stderr: status 2 if the user can mend them, 1 if a disk fails.

    output: a file that no other run may write at the same time. A command may raise KeyboardInterrupt with a text, such
    as "2 epochs are saved", which the line then reports.
    batch_size: of the command, for a message that says which to try if the memory is full.
    """
    who = f"{parser.prog}, rank {RANK}" if RANK else parser.prog
    # Python's own format adds a line of our source code, which does not help the user.
    warnings.formatwarning = lambda message, *_, **__: f"{who}: warning: {one_line(message)}\n"
    os.environ["MPLBACKEND"] = "agg"  # commands write figures to files, whatever the user's notebooks do
    status, told = 2, ""
    try:
        with locked(output) if output and not RANK else contextlib.nullcontext():
            import numpy  # noqa: F401, because torch, which imports it from C, would not let Ctrl-C through

            command()
            print(end="", flush=True)  # a closed pipe shows here, inside the try
        return
    except KeyboardInterrupt as interrupt:
        kept = f": {interrupt}" if str(interrupt) else ""
        parser.exit(130, None if RANK else f"{who}: interrupted{kept}\n")
    except UserError as error:
        told = str(error)
    except ValueError as error:
        from attacks import AttackError  # not at the top, because it imports torch

        if not isinstance(error, AttackError):
            raise
        told = str(error)
    except BrokenPipeError:  # the reader of our output, such as head, has ended: end as a shell command would
        parser.exit(128 + 13)
    except OSError as error:
        status, told = 2 if error.errno in UNUSABLE else 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"--batch-size {batch_size // 2}" if batch_size and batch_size > 1 else "a smaller network"
        told = f"the memory is full: try {smaller}"
    parser.exit(status, f"{who}: error: {printable(told)}\n")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full. torch has a class of its own for a GPU's memory only."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in ("out of memory", "can't allocate memory"))
