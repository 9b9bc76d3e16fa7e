"""The explorer: choose or upload an image, attack several networks at once, and see what each of them says.

The page asks and a worker answers. While somebody moves a slider, the worker drops every request but the newest, so
the page always shows the last position and never waits for the positions before it.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attacks import default_step_size, pgd_iterates
from attacks.core import Model, attacking, evaluation_mode, faster_equivalent, input_gradient, logits_of
from utils import plotting
from utils.constants import UserError
from utils.data import Split
from utils.images import LARGEST_UPLOAD, read_upload
from utils.quoting import one_line, printable
from utils.tables import epsilon_text

ATTACKS = ("PGD", "FGSM", "random noise")
WIDGET = "application/vnd.jupyter.widget-view+json"
SIDE = 132  # pixels of the page, of each picture's sides


@dataclass(frozen=True)
class Request:
    """What the page asks for. image: float (1, 3, H, W) in [0, 1]; label: of a test image; None for an upload."""

    image: Tensor
    label: int | None
    attack: str
    epsilon: float
    steps: int
    target: int | None  # the class that the attack wants; None: any other class
    transferred: bool  # every network gets the examples of the first one


@dataclass(frozen=True)
class Answer:
    """What one network says. before, after: float (K,), the probabilities of the classes for image and adversarial."""

    adversarial: Tensor
    before: Tensor
    after: Tensor
    right: int  # the label; for an image without one, the network's answer before the attack


class Explorer:
    """Widgets to choose an image and an attack, above a row for each network: image, perturbation, answers.

    Where widgets do not work, such as on GitHub, a picture of the same rows is shown instead.
    """

    def __init__(
        self, split: Split, networks: Mapping[str, nn.Module], *, largest: int = 16, examples: int = 20, start: int = 0
    ) -> None:
        """split: its first `examples` images are offered, at first the one numbered `start`.

        networks: what the reader sees -> network, on the device of the split. The first one crafts the transferred
        examples. largest: the largest radius, in grey levels of 255; the slider starts in the middle.
        """
        self.split = split
        self.networks = {name: faster_equivalent(network) for name, network in networks.items()}
        self.names = [printable(name) for name in split.class_names]
        self._upload: Tensor | None = None
        self._newest: Request | None = None
        # One image is too small to share between threads: two threads wait for each other most of the time.
        self._worker = ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, 1))
        self._build(largest, min(examples, len(split)), start)
        self.show()

    # ---- the page ----

    def _build(self, largest: int, examples: int, start: int) -> None:
        import ipywidgets as widgets

        width, style = {"width": "19em"}, {"description_width": "5.5em"}

        def menu(description: str, options: Sequence[Any]) -> Any:
            return widgets.Dropdown(options=options, description=description, layout=width, style=style)

        def slider(description: str, value: int, low: int, high: int) -> Any:
            wide = {"width": "34em", "max_width": "100%"}
            return widgets.IntSlider(value, low, high, description=description, layout=wide, style=style)

        pictures = [(f"{i}: {self.names[label]}", i) for i, label in enumerate(self.split.labels[:examples].tolist())]
        self.image = menu("image", [*pictures, ("my own picture", None)])
        self.image.value = start
        self.attack = menu("attack", ATTACKS)
        self.target = menu("target", [("any other class", None), *((name, i) for i, name in enumerate(self.names))])
        first = next(iter(self.networks))
        self.source = menu("crafted on", [("the network itself", False), (f"the {first}", True)])
        self.levels = slider("ε × 255", largest // 2, 0, largest)
        self.steps = slider("steps", 10, 1, 40)
        self.upload = widgets.FileUpload(
            accept="image/*", description=f"upload, up to {LARGEST_UPLOAD >> 20} MiB", layout=width
        )
        self.message = widgets.HTML()
        self.rows = {name: widgets.HTML() for name in self.networks}
        for choice in (self.image, self.attack, self.target, self.source, self.levels, self.steps):
            choice.observe(self.show, names="value")
        self.upload.observe(self._receive, names="value")
        wrapped = {"flex_flow": "row wrap"}
        menus = widgets.HBox([self.image, self.upload, self.attack, self.source, self.target], layout=wrapped)
        parts = [menus, self.levels, self.steps, self.message, *self.rows.values()]
        self.box = widgets.VBox(parts, layout={"max_width": "62em"})

    def _receive(self, change: Mapping[str, Any]) -> None:
        """Take an uploaded file. It may hold anything: what is wrong with it becomes a line in the page."""
        try:
            self._upload = read_upload(bytes(change["new"][0]["content"]), self.split.images.shape[-1])
        except UserError as error:
            self._upload, self._newest = None, None
            self._say(str(error), wrong=True)
            return
        if self.image.value is None:
            self.show()
        else:
            self.image.value = None  # which shows it

    def request(self) -> Request:
        """What the widgets say now. Raises UserError if nobody has uploaded the picture that is asked for."""
        index, label = self.image.value, None
        if index is not None:
            image, labels = self.split.take(torch.tensor([index], device=self.split.device))
            label = int(labels)
        elif self._upload is not None:
            image = self._upload.to(self.split.device)
        else:
            raise UserError("Upload a picture first: PNG, JPEG, WebP or BMP.")
        return Request(
            image,
            label,
            self.attack.value,
            self.levels.value / 255,
            self.steps.value,
            self.target.value,
            self.source.value,
        )

    def show(self, _change: object = None) -> "Future[None]":
        """Ask for new rows and return at once. The widgets call this with each change. The Future is for tests."""
        self.steps.disabled = self.attack.value != "PGD"
        self.target.disabled = self.attack.value == "random noise"
        try:
            self._newest = self.request()
        except UserError as error:
            self._newest = None
            self._say(str(error), wrong=True)
        return self._worker.submit(self._answer_newest, self._newest)

    def _answer_newest(self, request: Request | None) -> None:
        """Fill the rows, unless a newer request comes first."""
        if request is None or request is not self._newest:
            return
        try:
            for name, answer in self.answers(request, droppable=True):
                self.rows[name].value = self._row(name, request, answer)
            if request is self._newest:
                self._say(self._caption(request))
        except Exception as error:  # nobody reads what a worker raises
            self._say(f"{type(error).__name__}: {one_line(error)}", wrong=True)

    def _say(self, text: str, *, wrong: bool = False) -> None:
        color = plotting.WRONG["color"] if wrong else plotting.GREY
        self.message.value = f'<div role="status" style="color:{color};line-height:1.5">{html.escape(text)}</div>'

    # ---- the attack ----

    def answers(self, request: Request, *, droppable: bool = False) -> Iterator[tuple[str, Answer]]:
        """The name of each network and its Answer, one after the other.

        droppable: end early once the page has a newer request.
        """
        source = next(iter(self.networks.values()))
        for name, network in self.networks.items():
            before = _probabilities(network, request.image)
            right = int(before.argmax()) if request.label is None else request.label
            for iterate in _iterates(source if request.transferred else network, request, right):
                adversarial = iterate
                if droppable and request is not self._newest:
                    return
            yield name, Answer(adversarial, before, _probabilities(network, adversarial), right)

    # ---- what is shown ----

    def _caption(self, request: Request) -> str:
        if request.label is None:
            return (
                f"Your picture, as the networks see it: {request.image.shape[-1]} × {request.image.shape[-2]} pixels. "
                "It has no label here. Green: what a network said before the attack. Purple: another answer."
            )
        return f"The label is {self.names[request.label]}. Green: the right answer. Purple: a wrong one."

    def _row(self, name: str, request: Request, answer: Answer) -> str:
        """The row of a network as HTML. Everything that may come from a stranger is escaped."""
        change = answer.adversarial - request.image
        largest = change.abs().max().item()
        magnified = f"change, × {0.5 / largest:.3g}" if largest else "no change"
        pictures = {
            "before": request.image,
            magnified: change / (2 * largest or 1) + 0.5,
            f"after, epsilon {epsilon_text(request.epsilon)}": answer.adversarial,
        }
        cells = "".join(_picture(title, picture[0], name) for title, picture in pictures.items())
        return (
            f'<div style="display:flex;flex-wrap:wrap;gap:10px;align-items:flex-start;margin:4px 0">'
            f'<div style="flex:1 0 100%;font-weight:bold">{html.escape(name)}: {self._verdict(answer)}</div>'
            f"{cells}{self._bars(answer)}</div>"
        )

    def _verdict(self, answer: Answer) -> str:
        said = []
        for probabilities in (answer.before, answer.after):
            best = int(probabilities.argmax())
            look = plotting.RIGHT if best == answer.right else plotting.WRONG
            text = f"{html.escape(self.names[best])}, {100 * probabilities[best]:.0f} %"
            said.append(f'<span style="color:{look["color"]}">{text}</span>')
        return " → ".join(said)

    def _bars(self, answer: Answer) -> str:
        """A bar before and a bar after the attack for each class; of many classes, for the likeliest ten."""
        shown = sorted((answer.before + answer.after).topk(min(10, len(self.names))).indices.tolist())
        lines = []
        for k in shown:
            colour = plotting.RIGHT if k == answer.right else plotting.WRONG
            bars = "".join(
                f'<div style="height:5px;width:{100 * float(part[k]):.1f}%;background:{paint}"></div>'
                for part, paint in ((answer.before, "#BBBBBB"), (answer.after, colour["color"]))
            )
            title = f"{html.escape(self.names[k])}: {100 * answer.before[k]:.1f} %, then {100 * answer.after[k]:.1f} %"
            lines.append(
                f'<div style="display:flex;line-height:13px;font-size:12px" title="{title}">'
                f'<div style="width:5.5em;text-align:right;padding-right:6px">{html.escape(self.names[k])}</div>'
                f'<div style="flex:1;background:#F4F4F4;padding:1px 0">{bars}</div></div>'
            )
        legend = '<div style="font-size:12px">grey: before the attack; coloured: after</div>'
        return f'<div style="flex:1;min-width:18em">{"".join(lines)}{legend}</div>'

    def figure(self) -> Figure:
        """The rows as a figure, for pages where widgets do not work. Raises UserError as `request` does."""
        request = self.request()
        found = dict(self.answers(request))
        attack = f"{request.attack}, epsilon = {epsilon_text(request.epsilon)}"
        labels = torch.tensor([next(iter(found.values())).right], device=request.image.device)
        titled = {f"{name}: {attack}": name for name in found}
        networks = {title: self.networks[name] for title, name in titled.items()}
        adversarial = {title: found[name].adversarial for title, name in titled.items()}
        return plotting.attacked_images(networks, request.image, adversarial, labels, self.split)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Jupyter shows: the widgets, and a picture of the rows for pages where widgets do not work."""
        picture = base64.b64encode(plotting.png(self.figure(), dpi=110)).decode()
        widget = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}  # in ipywidgets 7 and 8
        names = ", ".join(self.networks)
        alt = (
            f"An image under attack, a row for each of: {names}. Image, perturbation, adversarial image, probabilities"
        )
        return {WIDGET: widget, "image/png": picture, "text/plain": "the explorer"}, {"image/png": {"alt": alt}}


def _iterates(network: Model, request: Request, right: int) -> Iterator[Tensor]:
    """The images (1, 3, H, W) on the way of the attack through this network; the last one is the adversarial image."""
    image, epsilon = request.image, request.epsilon
    if request.attack == "random noise":
        signs = torch.randint(2, image.shape, generator=torch.Generator().manual_seed(0)).to(image) * 2 - 1
        yield (image + epsilon * signs).clamp(0, 1)
        return
    wanted, sign = (right, 1) if request.target is None else (request.target, -1)
    labels = torch.tensor([wanted], device=image.device)
    sizes = [default_step_size(epsilon, request.steps)] * request.steps if request.attack == "PGD" else [epsilon]

    def gradient(iterate: Tensor) -> Tensor:
        return sign * input_gradient(network, iterate, labels)[2]

    with attacking(network, image.device):
        yield from pgd_iterates(image, image, gradient, epsilon=epsilon, sizes=sizes)


def _probabilities(network: Model, image: Tensor) -> Tensor:
    """The probability of each class, float (K,), for an image (1, 3, H, W)."""
    with torch.no_grad(), evaluation_mode(network):
        return logits_of(network, image).softmax(1)[0]


def _picture(title: str, image: Tensor, name: str) -> str:
    """An image (3, H, W), enlarged without smoothing, above its title."""
    alt = html.escape(f"{name}: {title}")
    return (
        f'<figure style="margin:0;text-align:center;font-size:12px"><img alt="{alt}" src="data:image/png;base64,'
        f'{_png(image)}" style="width:{SIDE}px;height:{SIDE}px;image-rendering:pixelated">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _png(image: Tensor) -> str:
    """The pixels as a PNG in base64."""
    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(image.detach().clamp(0, 1).cpu()).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
