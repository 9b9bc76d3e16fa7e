"""The explorer: every choice changes its rows, the rows show the attack, and an upload may hold anything."""

import base64
import io
import re
import time
from dataclasses import replace

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from attacks import fgsm
from tests.helpers.project import ROOT
from utils.checkpoints import load_checkpoint
from utils.data import to_unit_range
from utils.evaluation import predictions
from utils.explorer import ATTACKS, WIDGET, Explorer


@pytest.fixture
def explorer(digits, trained):
    networks = {"baseline": load_checkpoint(trained("cnn")), "other": load_checkpoint(trained("cnn-lstm"))}
    return Explorer(digits["test"], networks, largest=100)


def rows(explorer):
    """The rows once the worker has answered, and the message above them."""
    explorer.show().result()
    return {name: row.value for name, row in explorer.rows.items()}, explorer.message.value


def picture(size=(50, 40), color=(250, 10, 10)):
    """The bytes of a PNG of one colour."""
    written = io.BytesIO()
    Image.new("RGB", size, color).save(written, "png")
    return written.getvalue()


def receive(explorer, content):
    explorer._receive({"new": ({"name": "a.png", "content": memoryview(content)},)})


def test_every_choice_changes_every_row(explorer):
    before, _ = rows(explorer)
    for choice, value in (
        (explorer.levels, 12),
        (explorer.image, 3),
        (explorer.steps, 3),
        (explorer.target, 5),
        (explorer.source, True),
        (explorer.attack, "FGSM"),
        (explorer.attack, "random noise"),
        (explorer.levels, 0),
    ):
        choice.value = value
        after, message = rows(explorer)
        assert "Error" not in message
        changed = [name for name in before if after[name] != before[name]]
        assert changed == (["other"] if choice is explorer.source else [*before]), choice.description
        before = after


@pytest.mark.parametrize("attack", ATTACKS)
def test_answers_are_those_of_the_attack(attack, explorer):
    explorer.image.value, explorer.attack.value, explorer.levels.value = 2, attack, 51
    images, labels = explorer.split.take(torch.tensor([2]))
    for name, answer in explorer.answers(explorer.request()):
        network = explorer.networks[name]
        assert (answer.adversarial - images).abs().max() <= 51 / 255 + 1e-6
        torch.testing.assert_close(answer.after, network(answer.adversarial).softmax(1)[0].detach())
        if attack == "FGSM":
            torch.testing.assert_close(answer.adversarial, fgsm(network, images, labels, epsilon=51 / 255))


def test_transferred_examples_are_those_of_the_first_network(explorer):
    explorer.source.value = True
    first, second = (answer.adversarial for _, answer in explorer.answers(explorer.request()))
    assert torch.equal(first, second)


def test_an_attack_with_a_target_makes_it_more_likely(explorer):
    explorer.target.value = 8
    for _, answer in explorer.answers(explorer.request()):
        assert answer.after[8] > answer.before[8]


def test_only_the_newest_request_is_answered(explorer):
    """As when somebody drags a slider: the page does not wait, and old positions cost nothing."""
    rows(explorer)
    asked = []
    original = explorer.answers
    explorer.answers = lambda request, **options: asked.append(request) or original(request, **options)
    explorer.steps.value = 40
    start = time.monotonic()
    for level in range(60):
        explorer.levels.value = level
    moved = time.monotonic() - start
    shown, _ = rows(explorer)
    assert len(asked) < 60
    assert asked[-1].epsilon == 59 / 255
    assert moved < 30  # the slider did not wait for sixty attacks
    assert all("after, epsilon 59/255" in row for row in shown.values())


def test_a_picture_of_ones_own_is_resized_shown_and_attacked(explorer):
    before, _ = rows(explorer)
    receive(explorer, picture())
    after, message = rows(explorer)
    assert explorer.image.value is None
    assert "32 × 32" in message
    assert all(after[name] != before[name] for name in before)
    shown = base64.b64decode(re.search(r"base64,([^\"]+)", after["baseline"])[1])
    pixels = np.asarray(Image.open(io.BytesIO(shown)))
    assert pixels.shape == (32, 32, 3)
    assert (pixels == (250, 10, 10)).all()
    for _, answer in explorer.answers(explorer.request()):
        assert answer.right == int(answer.before.argmax())  # an upload has no label


@pytest.mark.parametrize(
    "content",
    [b"", b"<script>alert(1)</script>", picture()[:60], bytes(2**24 + 1)],
    ids=["empty", "not a picture", "truncated", "too long"],
)
def test_a_hostile_upload_is_one_line_in_the_page(content, explorer):
    before, _ = rows(explorer)
    receive(explorer, content)
    line = re.fullmatch(r"<div[^>]*>(.*)</div>", explorer.message.value)[1]
    assert line.startswith("the picture ")
    assert len(line) < 300
    assert "<" not in line
    assert {name: row.value for name, row in explorer.rows.items()} == before
    explorer.levels.value += 1  # the page goes on with the image it had
    assert rows(explorer)[0] != before


def test_without_an_upload_it_says_what_to_do(explorer):
    explorer.image.value = None
    assert "Upload a picture first" in rows(explorer)[1]


def test_names_of_classes_are_escaped(digits, trained):
    names = ("<img src=x onerror=alert(1)>", *digits["test"].class_names[1:])
    hostile = replace(digits["test"], class_names=names)
    shown, message = rows(Explorer(hostile, {"<b>": load_checkpoint(trained("cnn"))}))
    assert "<img src=x" not in "".join(shown.values()) + message
    assert "<b>" not in shown["<b>"]


def test_what_goes_wrong_in_the_worker_is_shown(explorer):
    explorer.networks["other"] = lambda images: images.flatten(1) * float("nan")
    assert "AttackError" in rows(explorer)[1]


def test_where_widgets_do_not_live_a_picture_of_all_rows_stands_in(explorer):
    bundle, about = explorer._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == explorer.box.model_id
    drawn = matplotlib.image.imread(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert drawn.shape[0] / drawn.shape[1] == pytest.approx(2 * 2.5 / 8, rel=0.01)
    assert "baseline, other" in about["image/png"]["alt"]
    plt.close("all")


def test_answer_comes_at_once(digits):
    """Three networks with the default attack, PGD with ten steps, on an image whose label no step changes."""
    networks = {n: load_checkpoint(ROOT / "models" / f"{n}.safetensors") for n in ("cnn", "cnn-lstm", "cnn-robust")}
    split = digits["test"].first(2)
    split = replace(split, labels=predictions(networks["cnn-robust"], to_unit_range(split.images)))
    explorer = Explorer(split, networks)
    seconds = []
    for level in (1, 2, 3, 2, 1):
        start = time.process_time()  # a busy machine takes longer, but not more of this time
        explorer.levels.value = level
        rows(explorer)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
