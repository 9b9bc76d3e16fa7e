"""Fixtures that several tests share: data, trained networks and a finished study."""

import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers.project import QUICK, ROOT, command
from tests.helpers.warm import finished
from utils.data import load_split
from utils.recipes import RECIPES
from utils.training import train

LONG = ("test_study.py", "test_diagnosis.py", "test_commands.py", "test_files.py", "test_defended_training.py")


def pytest_collection_modifyitems(items):
    """Start with the slowest tests, so that the processes that run tests finish at about the same time."""
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.path.name in LONG))


@pytest.fixture(scope="session")
def cifar10_dir():
    """The folder with CIFAR-10: $DATA_DIR if it is set, else data/."""
    from torchvision.datasets import CIFAR10

    data_dir = Path(os.environ.get("DATA_DIR") or ROOT / "data")
    if not (ROOT / data_dir / CIFAR10.base_folder).is_dir():
        if os.environ.get("DATA_DIR"):
            pytest.fail(f"DATA_DIR is {data_dir}, which has no {CIFAR10.base_folder}")
        pytest.skip("CIFAR-10 is not here: set DATA_DIR to the folder that holds cifar-10-batches-py")
    return ROOT / data_dir


@pytest.fixture(scope="session")
def digits():
    """The three splits of digits, by name."""
    return {split: load_split("digits", split) for split in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The temporary folder of all processes that run tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def trained(digits, shared):
    """A function that returns the path of a checkpoint of the named network, trained on digits for a few seconds.

    It is made once and shared by all processes that run tests: a test may copy it but not change it.
    """

    def checkpoint(name):
        path = shared / "trained" / f"{name}.safetensors"
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                recipe = RECIPES["paper"]  # Adam learns the digits with either network in a few epochs
                train(name, digits["train"], digits["validation"], recipe, output=path, width=8, quiet=True)
        return path

    return checkpoint


@pytest.fixture(scope="session")
def quick_study(script, shared):
    """A folder in which the study ran on digits without an interruption. stdout.txt has what it printed.

    It is made once and shared by all processes that run tests: a test may copy it but not change it.
    """
    folder, making = shared / "study", shared / "study-in-the-making"
    with FileLock(shared / "study.lock"):
        if not folder.exists():
            making.mkdir()
            result = script("study", *QUICK, "--epochs", 1, cwd=making)
            assert result.returncode == 0, result.stderr
            (making / "stdout.txt").write_text(result.stdout, encoding="utf-8")
            making.rename(folder)
    return folder


@pytest.fixture(scope="session")
def script():
    """A function that runs a script or the study (tests.helpers.project.command) and returns the finished process.

    Only an environment of its own needs a new interpreter.
    """

    def run(name, *arguments, cwd=ROOT, **environment):
        if not environment:
            return finished(name, *arguments, cwd=cwd, timeout=300)
        return subprocess.run(
            command(name, *arguments),
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
