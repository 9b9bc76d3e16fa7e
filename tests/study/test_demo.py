"""The demo: it tells the story with a table, a sentence and a picture; a second run only reads what is there."""

import io
import re
import shutil
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from study import demo
from study.__main__ import main
from utils.checkpoints import load_checkpoint
from utils.evaluation import ATTACKS, accuracy


def tell(folder: Path, epochs: int = 1) -> str:
    """What `python -m study demo` prints, with tiny networks."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(printed):
        warnings.simplefilter("ignore")  # networks that have learnt so little may have gradients of zero
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the command sets another one
        patch.setattr(sys, "argv", ["study", "demo", "--epochs", str(epochs), "--results", str(folder)])
        patch.setattr(demo, "WIDTH", 2)
        main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with a finished demo, which tests may copy but not change, and what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, tell(folder)


def ending(printed: str) -> list[str]:
    """The table, an empty line, the sentence in two lines, and the path."""
    return printed.splitlines()[-8:]


def test_the_steps_stand_in_order_and_each_shows_its_figures(told):
    _, printed = told
    steps = re.split(r"^\d/5  ", printed, flags=re.MULTILINE)[1:]
    assert len(steps) == 5
    assert [step.count("epoch 1/1") for step in steps] == [1, 0, 1, 0, 1]
    assert all("% of 300 test images are right (95 % interval: " in step for step in steps)


def test_the_table_ends_the_story(told, digits):
    folder, printed = told
    header, *rows, empty, _, _, path = ending(printed)
    assert re.split(r" {2,}", header)[1:] == ["clean", "transferred FGSM", "white-box FGSM", "PGD"]
    assert [re.split(r" {2,}", row)[0] for row in rows] == list(demo.STEMS)
    assert all(len(re.findall(r"\d+\.\d \(\d+ to \d+\)", row)) == 4 for row in rows)
    for row, stem in zip(rows, demo.STEMS.values(), strict=True):
        clean = accuracy(load_checkpoint(folder / f"{stem}.safetensors"), digits["test"])
        assert re.split(r" {2,}", row)[1].startswith(f"{100 * clean:.1f} (")
    assert empty == ""
    assert path == str(folder / "demo.png")
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_the_sentence_has_the_figures_of_the_table(told):
    rows = {
        row[:22].strip(): [float(cell) for cell in re.findall(r"(\d+\.\d) \(", row)] for row in ending(told[1])[1:4]
    }
    figures = rows[demo.RETRAINED][1], rows[demo.RETRAINED][3], rows[demo.ROBUST][3]
    sentence = " ".join(ending(told[1])[5:7])
    assert [int(figure) for figure in re.findall(r"(\d+) %", sentence)] == [round(figure) for figure in figures]


def test_a_second_run_neither_trains_nor_tests(told, monkeypatch):
    folder, printed = told
    attacked = []  # how many images each attack got

    def counted(attack):
        return lambda model, images, *others, **options: (
            attacked.append(len(images)) or attack(model, images, *others, **options)
        )

    for name, attack in ATTACKS.items():
        monkeypatch.setitem(ATTACKS, name, counted(attack))
    monkeypatch.setattr(demo, "train", None)
    again = tell(folder)
    assert again.count("safetensors is there already") == 3
    assert set(attacked) == {1}  # the picture's
    assert ending(again) == ending(printed)


@pytest.mark.slow
def test_a_demo_that_was_interrupted_trains_only_what_is_missing(told, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(told[0], folder)
    lost = folder / "cnn-n-fgsm-0.1.safetensors"
    before = load_checkpoint(lost).state_dict()
    lost.unlink()
    again = tell(folder)
    assert again.count("is there already") == 2
    after = load_checkpoint(lost).state_dict()
    assert all(after[name].equal(before[name]) for name in before)


def test_networks_of_another_length_stay(told, capsys):
    folder, _ = told
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    with pytest.raises(SystemExit) as ended:
        tell(folder, epochs=2)
    assert ended.value.code == 2
    assert "epochs 1, not 2; --results names another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before
