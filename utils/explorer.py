"""The explorer of the notebooks: choose an image, a network, an attack and a radius, and see what happens."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attacks import fgsm, pgd
from utils import plotting
from utils.data import Split
from utils.tables import epsilon_text

CHOICES: dict[str, Callable[..., Tensor]] = {
    "FGSM": fgsm,
    "PGD, 10 steps": lambda *batch, epsilon: pgd(*batch, epsilon=epsilon, steps=10),
}
WIDGET = "application/vnd.jupyter.widget-view+json"


class Explorer:
    """Widgets to choose an image, a network, an attack and a radius, above a picture of the result.

    Where widgets do not work, such as on GitHub, a picture of all networks is shown instead.
    """

    def __init__(
        self, split: Split, networks: Mapping[str, nn.Module], *, largest: int = 16, examples: int = 20, start: int = 0
    ) -> None:
        """split: its first `examples` images are offered, at first the one numbered `start`.

        networks: what the reader sees -> network, on the device of the split. largest: the largest radius, in grey
        levels of 255; the slider starts in the middle.
        """
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

    def show(self, change: object = None) -> None:
        """Run the chosen attack and draw the result. The widgets call this with each change."""
        self.picture.value = plotting.png(self.figure([self.network.value]), dpi=80)

    def figure(self, names: Sequence[str]) -> Figure:
        """The chosen image under the chosen attack at the chosen radius: a row for each network of these names."""
        images, labels = self.split.take(torch.tensor([self.image.value], device=self.split.device))
        attack, epsilon = self.attack.value, self.levels.value / 255
        titled = {f"{name}: {attack}, epsilon = {epsilon_text(epsilon)}": self.networks[name] for name in names}
        adversarial = {
            title: CHOICES[attack](network, images, labels, epsilon=epsilon) for title, network in titled.items()
        }
        return plotting.attacked_images(titled, images, adversarial, labels, self.split)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """What Jupyter shows: the widgets, and a picture of all networks for pages where widgets do not work."""
        picture = base64.b64encode(plotting.png(self.figure(list(self.networks)), dpi=110)).decode()
        widget = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}  # in ipywidgets 7 and 8
        return {WIDGET: widget, "image/png": picture, "text/plain": "the explorer"}
