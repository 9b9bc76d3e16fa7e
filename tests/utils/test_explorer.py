"""The explorer of the notebooks: every choice changes its picture, and the picture shows the attack."""

import base64
import io
import time
from dataclasses import replace

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from tests.helpers.project import ROOT
from utils.checkpoints import load_checkpoint
from utils.data import to_unit_range
from utils.evaluation import predictions
from utils.explorer import CHOICES, WIDGET, Explorer


@pytest.fixture
def explorer(digits, trained):
    networks = {"baseline": load_checkpoint(trained("cnn")), "other": load_checkpoint(trained("cnn-lstm"))}
    return Explorer(digits["test"], networks, largest=100)


def pixels(picture: bytes) -> np.ndarray:
    """The pixels of a PNG."""
    return matplotlib.image.imread(io.BytesIO(picture))


def test_every_choice_changes_the_picture(explorer):
    before = pixels(explorer.picture.value)
    for choice, value in (
        (explorer.levels, 12),
        (explorer.image, 3),
        (explorer.network, "other"),
        (explorer.attack, "PGD, 10 steps"),
        (explorer.levels, 0),
    ):
        choice.value = value
        after = pixels(explorer.picture.value)
        below = len(after) // 8  # without the title, which would differ in any case
        assert (after[below:] != before[below:]).any(), choice
        before = after


@pytest.mark.parametrize("name", ["baseline", "other"])
@pytest.mark.parametrize("attack", CHOICES)
def test_figure_shows_the_attack(name, attack, explorer):
    explorer.image.value, explorer.attack.value, explorer.levels.value = 2, attack, 51
    figure = explorer.figure([name])
    image, perturbation, adversarial, bars = figure.axes
    images, labels = explorer.split.take(torch.tensor([2]))
    crafted = CHOICES[attack](explorer.networks[name], images, labels, epsilon=51 / 255)
    for drawn, expected in ((image, images), (adversarial, crafted)):
        torch.testing.assert_close(torch.tensor(drawn.images[0].get_array()).permute(2, 0, 1)[None], expected)
    assert perturbation.get_title() == f"perturbation, magnified {0.5 / (crafted - images).abs().max():.3g} times"
    wanted = explorer.networks[name](torch.cat([images, crafted])).softmax(1).detach()
    drawn = torch.tensor([bar.get_width() for bar in bars.patches]).float().view(2, 10)
    torch.testing.assert_close(drawn / 100, wanted, atol=1e-5, rtol=0)
    plt.close(figure)


def test_where_widgets_do_not_live_a_picture_of_all_networks_stands_in(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == explorer.box.model_id
    one, all_of_them = pixels(explorer.picture.value), pixels(base64.b64decode(bundle["image/png"]))
    (height, width, _), (taller, wider, _) = one.shape, all_of_them.shape
    assert taller / wider == pytest.approx(2 * height / width)


def test_picture_changes_at_once(digits):
    """With the widest network and the slowest attack, on an image whose label no step changes."""
    robust = load_checkpoint(ROOT / "models" / "cnn-robust.safetensors")
    split = digits["test"].first(2)
    split = replace(split, labels=predictions(robust, to_unit_range(split.images)))
    explorer = Explorer(split, {"robust": robust})
    explorer.attack.value = "PGD, 10 steps"
    seconds = []
    for level in (1, 2, 3, 2, 1):
        start = time.process_time()  # a busy machine takes longer, but not more of this time
        explorer.levels.value = level
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
