"""The README's moving picture: a frame for each radius, in the colours that mean something, and small."""

import io

import pytest
from PIL import Image, ImageColor

from study.animation import animation
from tests.helpers.project import ROOT
from utils.checkpoints import load_checkpoint
from utils.explorer import Explorer
from utils.plotting import RIGHT, WRONG


def colors(frame):
    return {color for _, color in frame.convert("RGB").getcolors(2**24)}


def near(color, found):
    return any(sum(abs(a - b) for a, b in zip(ImageColor.getrgb(color), other, strict=True)) < 12 for other in found)


@pytest.mark.slow
def test_a_frame_for_each_radius(digits, trained):
    network = load_checkpoint(trained("cnn"))
    shown = Explorer(digits["test"], {"baseline": network, "study's defence": network, "ours": network})
    moving = Image.open(io.BytesIO(animation(shown, levels=(0, 16, 255))))
    assert moving.format == "GIF"
    assert moving.n_frames == 3
    assert moving.info["loop"] == 0
    assert near(RIGHT["color"], colors(moving))  # without an attack, the answer is right
    moving.seek(2)
    assert near(WRONG["color"], colors(moving))


def test_the_shipped_one_is_small_and_described():
    path = ROOT / ".github" / "three-networks.gif"
    assert path.stat().st_size < 2 * 2**20
    with Image.open(path) as moving:
        assert moving.n_frames == 33
        assert moving.width == 800
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"]({path.relative_to(ROOT)})" in readme.split("\n| ")[0]  # above the first table
