"""The README's moving picture: one image, a growing radius, and three networks that change their minds."""

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from study.explore import explorer
from study.notebooks import Notebook
from utils.constants import ROOT
from utils.evaluation import correctly_classified
from utils.explorer import Answer, Explorer
from utils.files import write_atomically
from utils.plotting import BASELINE, GREY, OURS, RIGHT, STUDYS, WIDTH, WRONG, png, show_image

LEVELS = [level / 2 for level in range(33)]  # the radii of the frames, in grey levels of 255
COLORS = ("white", "black", STUDYS, OURS, GREY, RIGHT["color"], WRONG["color"])
MILLISECONDS, HELD = 250, 2000  # that a frame stands, and the first and the last one


def animation(shown: Explorer, levels: Sequence[float] = LEVELS) -> bytes:
    """A GIF with a frame for each radius, under PGD with ten steps through each network's own gradient.

    The image is the first test image that all networks classify correctly, so the attack has no part in the choice.
    """
    from PIL import Image

    images, labels = shown.split.take(torch.arange(min(200, len(shown.split)), device=shown.split.device))
    with torch.no_grad():
        right = [correctly_classified(network, images, labels) for network in shown.networks.values()]
    first = int(torch.stack(right).all(0).nonzero()[0])
    request = replace(shown.request(), image=images[first : first + 1], label=int(labels[first]))
    frames = []
    for level in levels:
        answers = dict(shown.answers(replace(request, epsilon=level / 255)))
        frame = png(_frame(answers, shown.names, level), dpi=100)
        frames.append(_with_few_colors(Image.open(io.BytesIO(frame)).convert("RGB")))
    durations = [HELD, *[MILLISECONDS] * (len(frames) - 2), HELD]
    written = io.BytesIO()
    frames[0].save(written, "gif", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    return written.getvalue()


def _with_few_colors(frame: Any) -> Any:
    """A picture for a GIF: 140 colours, among them those that mean something, which would else be mixed with others."""
    from PIL import Image, ImageColor

    kept = [channel for color in COLORS for channel in ImageColor.getrgb(color)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(kept + frame.quantize(140 - len(COLORS)).getpalette()[: 3 * 140 - len(kept)])
    return frame.quantize(palette=palette, dither=Image.Dither.NONE)


def _frame(answers: dict[str, Answer], names: Sequence[str], level: float) -> Figure:
    """A column for each network: the attacked image, and the probability of each class."""
    figure, panels = plt.subplots(2, len(answers), figsize=(WIDTH, 4.6), height_ratios=(1.25, 1))
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.03, top=0.84, hspace=0.2, wspace=0.12)
    columns = zip(panels.T, answers.items(), (BASELINE, STUDYS, OURS), strict=True)
    for (above, below), (name, answer), color in columns:
        show_image(above, answer.adversarial[0])
        above.set_title(name, color=color, fontsize="medium", weight="bold")
        best = int(answer.after.argmax())
        look = RIGHT if best == answer.right else WRONG
        above.set_xlabel(f"{names[best]}, {100 * answer.after[best]:.0f} %", **look)
        places = np.arange(len(names))
        colors = [RIGHT["color"] if k == answer.right else WRONG["color"] for k in places]
        below.barh(places, 100 * answer.after.cpu().numpy(), color=colors)
        below.set(xlim=(0, 100), xticks=[], yticks=places, yticklabels=names if below is panels[1, 0] else [])
        below.tick_params(axis="y", labelsize="small", length=0)
        below.invert_yaxis()
    figure.text(0.5, 0.96, f"each pixel may change by {level:g}/255", ha="center", va="center")
    figure.add_artist(plt.Rectangle((0.1, 0.91), 0.88, 0.012, color="#EEEEEE"))
    figure.add_artist(plt.Rectangle((0.1, 0.91), 0.88 * level / max(LEVELS), 0.012, color=GREY))
    return figure


if __name__ == "__main__":
    path = sys.argv[1] if sys.argv[1:] else ROOT / ".github" / "three-networks.gif"
    write_atomically(path, animation(explorer(Notebook())))
