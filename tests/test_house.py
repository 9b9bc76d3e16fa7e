"""The rules of the house: short functions, private names, docstrings, and imports that point downward."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

PACKAGES = ("attacks", "networks", "defenses", "utils", "study")
LONGEST_FUNCTION = 80  # lines, with the docstring


def modules(*packages):
    """(path below the root, syntax tree) of each file of the packages."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in modules(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_a_name_with_an_underscore_stays_in_its_file():
    """Neither imported nor reached through its module."""
    found = []
    for path, tree in modules(*PACKAGES, "benchmarks"):
        ours = set()  # names of the project's modules in this file
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (*PACKAGES, "benchmarks"):
                ours |= {alias.asname or alias.name for alias in node.names}
                found += [f"{path}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                found += [f"{path}: {node.value.id}.{node.attr}"] if private else []
    assert found == []


def test_every_module_begins_with_a_sentence_about_itself():
    openings = {path: (ast.get_docstring(tree) or "").partition("\n")[0] for path, tree in modules(*PACKAGES, "tests")}
    assert {path: line for path, line in openings.items() if not line.endswith((".", "?"))} == {}


@pytest.mark.parametrize(
    ("file", "addition", "kept"),
    [
        ("attacks/pgd.py", "", True),
        ("attacks/pgd.py", "def later():\n    from utils import data\n", False),
        ("networks/cnn.py", "import attacks\n", False),
        ("defenses/losses.py", "import utils.data\n", False),
        ("utils/tables.py", "from study import paper\n", False),
        ("utils/tables.py", "def later():\n    from utils.commands import parser\n", False),
        ("utils/constants.py", "import utils.files\n", False),
        ("study/plan.py", "import benchmarks.timing\n", False),
    ],
)
def test_make_lint_refuses_an_import_that_points_upward(file, addition, kept, tmp_path):
    for package in (*PACKAGES, "benchmarks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a", encoding="utf-8") as changed:
        changed.write(addition)
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint_imports, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode == 0) == kept, result.stdout
    assert ("BROKEN" in result.stdout) != kept
