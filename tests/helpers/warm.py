"""Commands in processes that start with PyTorch and scikit-learn in memory: importing them takes five seconds.

The processes are forked from one that has imported the libraries and nothing of the project. Everything else is as in
a new interpreter: its own standard streams, folder and exit status.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.project import ROOT, prog

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "msgspec", "tqdm"])


def finished(name: str, *arguments: object, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a script or the study, as tests.helpers.project.command names them, to its end."""
    with tempfile.TemporaryDirectory() as temporary:
        streams = [Path(temporary, name) for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_run, args=(name, list(map(str, arguments)), cwd, streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(name, timeout)
        output, errors = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess([name, *arguments], process.exitcode, output, errors)


def _run(name: str, arguments: list[str], cwd: Path, streams: list[Path]) -> None:
    """Be the command: what the new process does."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    module, *subcommand = name.split()
    sys.argv = [str(ROOT / name) if name.endswith(".py") else prog(name), *subcommand, *arguments]
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
