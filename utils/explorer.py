"""TODO: utils.explorer."""

import base64
import io
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

from attacks import fgsm, pgd
from utils import plotting

CHOICES: dict[str, Callable] = {
    "FGSM": fgsm,
    "PGD, 10 steps": lambda *batch, epsilon: pgd(*batch, epsilon=epsilon, steps=10),
}


WIDGET = "application/vnd.jupyter.widget-view+json"


class Explorer:
    """Choose an image, a network, an attack and a radius, and see what happens; `show` is the callback.

    split: of its first `examples` images one is chosen, at first the one numbered `start`. networks: {what the reader
    sees: network}. largest: radius of the slider, in grey levels, of 255; it starts in the middle. Where widgets do not
    live, a picture of all networks stands in its place.
    """

    def __init__(self, split, networks, *, largest=16, examples=20, start=0):
        import ipywidgets as widgets

        self.split, self.networks = split, networks
        names = [f"{i}: {split.class_names[label]}" for i, label in enumerate(split.labels[:examples].tolist())]
        style = {"description_width": "5em"}
        options = [(name, i) for i, name in enumerate(names)]
        self.image = widgets.Dropdown(options=options, value=start, description="image")
        self.network = widgets.Dropdown(options=list(networks), description="network")
        self.attack = widgets.Dropdown(options=list(CHOICES), description="attack")
        self.levels = widgets.IntSlider(
            value=largest // 2, min=0, max=largest, description="epsilon × 255", continuous_update=True
        )
        self.levels.style.description_width = "8em"
        self.levels.layout.width = "36em"
        for choice in (self.image, self.network, self.attack):
            choice.style = style
            choice.observe(self.show, names="value")
        self.levels.observe(self.show, names="value")
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        choices = widgets.HBox([self.image, self.network, self.attack], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([choices, self.levels, self.picture])
        self.show()

    def show(self, change=None):
        """Attack as chosen, and draw."""
        self.picture.value = _png(self.figure([self.network.value]))

    def figure(self, names):
        """The picture of the chosen image, attack and radius, a row for each network of those names."""
        images, labels = self.split.take(torch.tensor([self.image.value], device=self.split.device))
        attack, epsilon = self.attack.value, self.levels.value / 255
        titled = {f"{name}: {attack}, epsilon = {plotting.pixels(epsilon)}": self.networks[name] for name in names}
        adversarial = {
            title: CHOICES[attack](network, images, labels, epsilon=epsilon) for title, network in titled.items()
        }
        return plotting.attacked_images(titled, images, adversarial, labels, self.split)

    def _repr_mimebundle_(self, **_):
        picture = base64.b64encode(_png(self.figure(list(self.networks)), dpi=110)).decode()
        widget = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}  # in ipywidgets 7 and 8
        return {WIDGET: widget, "image/png": picture, "text/plain": "the explorer"}


def _png(figure, dpi=80):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()
