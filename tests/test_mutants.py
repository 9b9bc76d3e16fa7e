"""Mutants change the code, and one that no test notices is reported."""

import ast
import asyncio
import os

import pytest

from tests.helpers.mutants import mutants, try_out

pytestmark = pytest.mark.slow

CODE = '''
def positive(numbers, *, strict: bool = False) -> int:
    """How many numbers are positive: 1 + 1."""
    count = 0
    for number in numbers:
        if number > 0:
            count += 1
    return sorted([count], reverse=True)[0]
'''
TEST = """
from attacks.counting import positive

def test_positive():
    assert positive([-1, 1, 2]) == 2
"""


def test_each_mutant_is_one_change_of_code_that_still_compiles():
    found = list(mutants("counting.py", CODE))
    changes = [mutant.change.removeprefix("counting.py:") for mutant in found]
    assert changes == [
        "2: False -> (True)",
        "4: 0 -> (1)",
        "6: number > 0 -> (not number > 0)",
        "6: number > 0 -> (number >= 0)",
        "6: 0 -> (1)",
        "7: count += 1 -> count -= 1",
        "7: count += 1 -> pass",
        "7: 1 -> (2)",
        "8: sorted([count], reverse=True) -> (sorted([count]))",
        "8: True -> (False)",
        "8: 0 -> (1)",
    ]
    assert len({ast.dump(ast.parse(mutant.code)) for mutant in found} - {ast.dump(ast.parse(CODE))}) == len(found)


@pytest.fixture
def project(tmp_path):
    """A project with one file and one test."""
    for folder, name, text in (("attacks", "counting.py", CODE), ("tests", "test_counting.py", TEST)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    return tmp_path


def test_survivors_are_reported_and_the_project_is_left_alone(project, capsys):
    found = [m for m in mutants("attacks/counting.py", CODE) if ":6: number" in m.change]
    survived = asyncio.run(try_out([(mutant, ["tests"]) for mutant in found], root=project))
    assert survived == ["attacks/counting.py:6: number > 0 -> (number >= 0)"]
    lines = sorted(capsys.readouterr().out.splitlines())
    assert [line.split()[0] for line in lines] == ["SURVIVED", "noticed"]
    assert lines[0].endswith(survived[0])
    assert sorted(os.listdir(project)) == ["attacks", "tests"]
    assert (project / "attacks" / "counting.py").read_text() == CODE


def test_tests_that_fail_anyway_prove_nothing(project):
    (project / "tests" / "test_counting.py").write_text("def test_nothing():\n    assert False\n")
    found = [(next(mutants("attacks/counting.py", CODE)), ["tests"])]
    with pytest.raises(SystemExit, match="fails without any change"):
        asyncio.run(try_out(found, root=project))
