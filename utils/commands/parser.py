"""What all commands share: flags, one line for every mistake, and the choice of a device.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils.commands import types
from utils.constants import DATASETS, UserError
from utils.files import locked
from utils.quoting import one_line

if TYPE_CHECKING:
    import torch

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
        text = "where to compute (default auto: cuda if available, else mps, else cpu)"
        self.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help=text)
        self.data = self.add_argument_group("data")
        text = "the folder with the data sets; missing ones are downloaded into it (default $DATA_DIR, else data)"
        self.data.add_argument("--data-dir", type=types.file_path, metavar="FOLDER", help=text)

    def add_training_flags(self) -> None:
        """Add the flags that the training of one network and the whole study share."""
        self.add_argument("--quiet", action="store_true", help="print only errors")
        text = "the data set to train on (default cifar10)"
        self.data.add_argument("--dataset", choices=DATASETS, default="cifar10", help=text)
        option = self.add_argument_group("network").add_argument
        option("--width", type=types.width, default=32, help="channels of the first convolution (default 32)")
        self.training = self.add_argument_group("training")
        text = (
            "number format of the training steps (default float32); bfloat16 takes half the time on GPUs and on CPUs "
        )
        text += "with AVX512_BF16 or AMX, and several times as long on other CPUs"
        self.training.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help=text)

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
