"""Mutants: `make mutants` changes the code in small ways, and shows which changes no test notices.

A mutant is one change in one file: an operator or a comparison replaced, a condition negated, a number changed, or an
argument, an entry of a dictionary or a statement left out. It runs in a copy of the project, against the tests that
mirror the file, except the slow ones, until the first test fails. A mutant that survives shows a line that no test
depends on: either a test is missing, or the change makes no difference.
"""

import argparse
import ast
import asyncio
import contextlib
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tests.helpers.project import ROOT

# What is changed, and the tests that mirror it.
MIRRORS = {
    "attacks": ["tests/attacks"],
    "defenses": ["tests/defenses"],
    "utils/evaluation.py": ["tests/utils/test_evaluation.py"],
    "utils/training.py": ["tests/utils/test_training.py"],
}
COPIED = ("attacks", "networks", "defenses", "utils", "study", "tests", "pyproject.toml", "*.py")  # what tests need
AT_ONCE = 2

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """path: of the changed file, from the root of the project. code: of the whole file, after the change."""

    path: str
    code: str
    change: str = ""


def mutants(path: str, code: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    lines = code.encode().splitlines(keepends=True)
    for node in _executed(ast.parse(code)):
        for old, new in _changes(node):
            start = sum(map(len, lines[: old.lineno - 1])) + old.col_offset
            end = sum(map(len, lines[: old.end_lineno - 1])) + old.end_col_offset
            before, after = code.encode()[start:end].decode(), ast.unparse(new)
            if isinstance(new, ast.expr):
                after = f"({after})"
            mutated = code.encode()[:start] + after.encode() + code.encode()[end:]
            change = textwrap.shorten(before, 120) + " -> " + textwrap.shorten(after, 120)
            yield Mutant(path, mutated.decode(), f"{path}:{old.lineno}: {change}")


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """The statements and expressions below a node, without annotations, decorators, texts and errors' messages."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            skipped = text or isinstance(child, (ast.JoinedStr, ast.Raise))
            if isinstance(child, ast.AST) and not skipped and name not in ("annotation", "returns", "decorator_list"):
                yield child
                yield from _executed(child)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of a part of the code and what may replace it."""

    def changed(**fields: object) -> tuple[ast.AST, ast.AST]:
        other = copy.copy(node)
        other.__dict__.update(fields)
        return node, other

    match node:
        case ast.Compare(ops=[operator]) if type(operator) in SWAPS:
            yield changed(ops=[SWAPS[type(operator)]()])
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in SWAPS:
            yield changed(op=SWAPS[type(operator)]())
        case ast.UnaryOp():
            yield node, node.operand
        case ast.If() | ast.While() | ast.IfExp():
            yield node.test, ast.UnaryOp(ast.Not(), node.test)
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, ast.Constant(value + 1)
        case ast.Call(keywords=[_, *_]):
            yield from (changed(keywords=[k for k in node.keywords if k is not gone]) for gone in node.keywords)
        case ast.Dict(keys=[_, _, *_]):
            for i in range(len(node.keys)):
                yield changed(keys=node.keys[:i] + node.keys[i + 1 :], values=node.values[:i] + node.values[i + 1 :])
    if isinstance(node, (ast.AugAssign, ast.Expr)):
        yield node, ast.Pass()


def chosen(count: int, seed: int, root: Path = ROOT) -> list[tuple[Mutant, list[str]]]:
    """As many mutants from each entry of MIRRORS, drawn with a seed, and the tests for each."""
    draw, found = random.Random(seed), []
    for place, tests in MIRRORS.items():
        files = sorted((root / place).glob("*.py")) if (root / place).is_dir() else [root / place]
        texts = {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}
        every = [mutant for path, code in texts.items() for mutant in mutants(path, code)]
        found += [(mutant, tests) for mutant in draw.sample(every, min(len(every), count // len(MIRRORS)))]
    return found


async def survives(mutant: Mutant, tests: list[str], folder: Path, patience: float) -> bool:
    """Whether all tests pass in a copy of the project with the mutant in it. Afterwards the copy is as it was.

    Tests that take longer than `patience` seconds count as failed: the mutant waits or loops for ever.
    """
    changed = folder / mutant.path
    original = changed.read_text(encoding="utf-8")
    changed.write_text(mutant.code, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    command.append(f"--basetemp={folder / 'temporary'}")
    process = await asyncio.create_subprocess_exec(
        *command, *tests, cwd=folder, env=environment, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return await asyncio.wait_for(process.wait(), patience) == 0
    except asyncio.TimeoutError:  # another class than TimeoutError until Python 3.11
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):  # with the processes that the tests have started
            os.killpg(process.pid, signal.SIGKILL)
        changed.write_text(original, encoding="utf-8")


async def try_out(found: list[tuple[Mutant, list[str]]], root: Path = ROOT) -> list[str]:
    """Run mutants against their tests, print what becomes of each, and return the changes that survived."""
    survived, free, patience = [], asyncio.Queue(), {}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(AT_ONCE):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            for source in chain.from_iterable(map(root.glob, COPIED)):
                if source.is_dir():
                    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, folder)
            free.put_nowait(folder)

        async def one(mutant: Mutant, tests: list[str]) -> None:
            folder = await free.get()
            start = time.monotonic()
            passed = await survives(mutant, tests, folder, patience.get(tests[0], 1e6))
            free.put_nowait(folder)
            seconds = time.monotonic() - start
            if mutant.change:
                survived.extend([mutant.change] if passed else [])
                print(f"{'SURVIVED' if passed else 'noticed':9}{seconds:4.0f} s  {mutant.change}", flush=True)
            elif passed:
                patience[tests[0]] = 60 + 3 * seconds
            else:
                raise SystemExit(f"{' '.join(tests)} fails without any change: mutants would prove nothing")

        unchanged = {
            tests[0]: (Mutant(m.path, (root / m.path).read_text(encoding="utf-8")), tests) for m, tests in found
        }
        await asyncio.gather(*(one(*pair) for pair in unchanged.values()))
        await asyncio.gather(*(one(*pair) for pair in found))
    return survived


def main() -> None:
    """Try out mutants from the command line. The exit status is 0 however many survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.mutants", description="try out mutants of the code")
    parser.add_argument("--count", type=int, default=40, help="number of mutants (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of mutants (default %(default)s)")
    args = parser.parse_args()
    found, start = chosen(args.count, args.seed), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        survived = asyncio.run(try_out(found))
        print(f"{len(survived)} of {len(found)} mutants survived, in {(time.monotonic() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
