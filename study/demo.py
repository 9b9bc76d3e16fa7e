"""The study's story in two minutes, step by step: the CNN on scikit-learn's digits, three times, under four attacks.

The radius and the lengths of the trainings were chosen on the validation images; the demo measures on the test images.
Finished trainings and batches of attacks are kept, so that a second run only reads them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from msgspec.structs import replace
from torch import nn

from defenses.losses import NFGSM
from utils import plotting
from utils.adversarial_sets import AugmentedSplit, adversarial_set
from utils.allocator import keep_freed_memory
from utils.checkpoints import load_checkpoint, read_metadata
from utils.constants import PGD_20, UserError
from utils.data import Split, load_split
from utils.evaluation import ATTACKS, Result, evaluate
from utils.notes import Notes
from utils.recipes import RECIPES
from utils.runs import check_same_arguments, training_arguments
from utils.training import train

EPSILON = 0.1  # of every attack and of both defences; digits are bright on black, so 8/255 would be too little
WIDTH = 16

PLAIN, RETRAINED, ROBUST = "baseline", "the study's defence", "adversarial training"
COLORS = {PLAIN: plotting.BASELINE, RETRAINED: plotting.STUDYS, ROBUST: plotting.OURS}
STEMS = {PLAIN: "cnn", RETRAINED: f"cnn-fgsm-augment-{EPSILON:g}", ROBUST: f"cnn-n-fgsm-{EPSILON:g}"}
RECIPE = {
    PLAIN: replace(RECIPES["long"], epochs=15),
    RETRAINED: replace(RECIPES["retrain-large"].with_defense(), epochs=8),
    ROBUST: replace(RECIPES["paper"].with_defense(), epochs=12),
}


class Attack(NamedTuple):
    """How the images of a column are made."""

    name: str  # a key of ATTACKS
    epsilon: float
    transferred: bool  # crafted on the baseline; else through the gradient of the network that is tested
    options: dict[str, Any]


UNTOUCHED, TRANSFERRED_FGSM, WHITE_BOX_FGSM, TWENTY_STEPS = "clean", "transferred FGSM", "white-box FGSM", "PGD"
ATTACKED = {
    UNTOUCHED: Attack("fgsm", 0.0, False, {}),
    TRANSFERRED_FGSM: Attack("fgsm", EPSILON, True, {}),
    WHITE_BOX_FGSM: Attack("fgsm", EPSILON, False, {}),
    TWENTY_STEPS: Attack("pgd", EPSILON, False, PGD_20),
}

Accuracies = dict[str, dict[str, Result]]  # network -> column -> how many test images it classifies correctly


class Demo:
    """The demo in one folder, which exists. epochs: of every training, for a quick look; None: those of RECIPE."""

    def __init__(self, folder: Path, *, epochs: int | None = None, seed: int = 0, device: str = "cpu") -> None:
        self.folder, self.epochs, self.seed, self.device = folder, epochs, seed, device
        self.splits = {name: load_split("digits", name) for name in ("train", "validation", "test")}
        self.test = self.splits["test"].to(device)
        self.networks: dict[str, nn.Module] = {}
        self.notes = Notes(folder / "tests.jsonl")  # the finished batches of all tests, kept for the next run
        keep_freed_memory()

    def tell(self) -> None:
        """Train and attack the three networks, step by step; end with the table, a sentence and the picture's path."""
        images = self.splits["train"]
        begin(1, f"Can a CNN read digits? It learns from {len(images):,} images.")
        self.prepare(PLAIN, images)
        self.show(PLAIN, UNTOUCHED)
        begin(2, f"Can an attack break it? FGSM makes each pixel darker or brighter by {EPSILON}, where white is 1.")
        self.show(PLAIN, WHITE_BOX_FGSM)
        begin(3, "Does the study's defence hold? A second CNN learns from the images and from such attacked images.")
        source = self.folder / f"{STEMS[PLAIN]}.safetensors"
        crafted = adversarial_set(source, images, folder=self.folder / "adversarial", device=self.device)
        self.prepare(RETRAINED, AugmentedSplit(images, crafted.direction, EPSILON, crafted.manifest.source_sha256))
        self.show(RETRAINED, TRANSFERRED_FGSM)
        begin(4, "Does it hold when the attack follows its own gradient, in one step (FGSM) or in twenty (PGD)?")
        self.show(RETRAINED, WHITE_BOX_FGSM, TWENTY_STEPS)
        begin(5, "Does adversarial training hold? A third CNN is attacked anew in each step of its training (N-FGSM).")
        self.prepare(ROBUST, images)
        self.show(ROBUST, WHITE_BOX_FGSM, TWENTY_STEPS)
        results = {name: {column: self.result(name, column) for column in ATTACKED} for name in STEMS}
        picture = self.folder / "demo.png"
        plotting.save(draw(self.networks, self.test, results), picture)
        print(f"\n{table(results)}\n\n{conclusion(results)}\n{picture}")

    def prepare(self, name: str, training: Split | AugmentedSplit) -> None:
        """Train a network, or the rest of an interrupted training; load it if it is there already."""
        path = self.folder / f"{STEMS[name]}.safetensors"
        recipe = replace(RECIPE[name], epochs=self.epochs or RECIPE[name].epochs)
        how: dict[str, Any] = {"width": WIDTH, "seed": self.seed, "defense": NFGSM(EPSILON) if name == ROBUST else None}
        try:
            if path.exists():
                wanted = training_arguments("cnn", training, recipe, **how)
                check_same_arguments(path, read_metadata(path).training, wanted)
                self.networks[name] = load_checkpoint(path, self.device)
                print(f"{path} is there already", flush=True)
            else:
                how |= {"output": path, "device": self.device, "resume": True}
                self.networks[name] = train("cnn", training, self.splits["validation"], recipe, **how)
        except UserError as error:
            raise UserError(f"{error}; --results names another folder") from None

    def show(self, name: str, *columns: str) -> None:
        """Test a network and print each accuracy with its interval."""
        for column in columns:
            result = self.result(name, column)
            low, high = (100 * limit for limit in result.confidence_interval)
            right = f"{100 * result.accuracy:5.1f} % of {result.examples} test images are right"
            print(f"  -> {column + ':':18}{right} (95 % interval: {low:.0f} to {high:.0f} %)", flush=True)

    def result(self, name: str, column: str) -> Result:
        """The accuracy of a network in a column of the table; tests of an earlier run are read from the notes."""
        attack, epsilon, transferred, options = ATTACKED[column]
        return evaluate(
            self.networks[name],
            self.test,
            attack,
            epsilon,
            options=options,
            source=self.networks[PLAIN] if transferred else None,
            notes=self.notes,
            progress=True,
        )


def begin(step: int, what: str) -> None:
    """Print what the next step is about."""
    print(f"\n{step}/5  {what}", flush=True)


def table(results: Accuracies) -> str:
    """Accuracy in percent with its 95 % interval, as plain text: a row for each network, a column for each attack."""
    lines = ["".join([f"{'correct (%)':22}", *(f"{column:19}" for column in ATTACKED)])]
    for name, row in results.items():
        cells = []
        for result in row.values():
            low, high = (100 * limit for limit in result.confidence_interval)
            cells.append(f"{f'{100 * result.accuracy:.1f} ({low:.0f} to {high:.0f})':19}")
        lines.append("".join([f"{name:22}", *cells]))
    return "\n".join(map(str.rstrip, lines))


def conclusion(results: Accuracies) -> str:
    """The table in a sentence."""
    held, broken, robust = (
        f"{100 * results[name][column].accuracy:.0f} %"
        for name, column in ((RETRAINED, TRANSFERRED_FGSM), (RETRAINED, TWENTY_STEPS), (ROBUST, TWENTY_STEPS))
    )
    return (
        f"The study's defence gets {held} right while the attack follows another network's gradient, and {broken} when "
        f"it follows its own;\nadversarial training then gets {robust} right."
    )


def draw(networks: dict[str, nn.Module], test: Split, results: Accuracies) -> Figure:
    """A row for each network: one test image under each attack, with the network's answer, and its accuracies.

    The image is the first that the networks answer as they answer most images of the column, rightly or wrongly.
    """
    measured = [result for row in results.values() for result in row.values()]
    typical = torch.stack([result.mask == (result.accuracy > 0.5) for result in measured])
    images, labels = test.take(typical.sum(0).argmax()[None].to(test.device))
    figure, cells = plt.subplots(
        3, 5, figsize=(plotting.WIDTH, 5), width_ratios=[1, 1, 1, 1, 1.6], layout="constrained"
    )
    for row, (name, network) in zip(cells, networks.items(), strict=True):
        row[0].set_ylabel("\n".join(name.rsplit(" ", 1)), color=COLORS[name], weight="bold")
        for axes, (attack, epsilon, transferred, options) in zip(row, ATTACKED.values(), strict=False):
            crafter = networks[PLAIN] if transferred else network
            attacked = ATTACKS[attack](crafter, images, labels, epsilon=epsilon, **options)
            ((answer, confidence),) = plotting.answers(network, attacked)
            plotting.show_image(axes, attacked[0])
            look = plotting.RIGHT if answer == labels.item() else plotting.WRONG
            axes.set_xlabel(f"“{test.class_names[answer]}”, {100 * confidence:.0f} %", **look)
        draw_accuracies(row[-1], results[name], COLORS[name])
    for axes, column in zip(cells[0], ATTACKED, strict=False):
        axes.set_title(column.replace(" ", "\n"), fontsize="medium")
    cells[0, -1].set_title(f"right answers (%)\non {len(test)} test images", fontsize="medium")
    title = f"Three CNNs under attack, epsilon = {EPSILON}"
    figure.suptitle(f"{title}\n(below each image: the answer; green: right; purple and bold: wrong)", fontsize="medium")
    return figure


def draw_accuracies(axes: Axes, row: dict[str, Result], color: str) -> None:
    """A bar for each attack, the first on top, with its value and 95 % interval."""
    values = plotting.percentages(list(row.values()))
    limits = 100 * torch.tensor([result.confidence_interval for result in row.values()]).T.numpy()
    axes.barh(list(row), values, color=color, alpha=0.85, height=0.62)
    axes.errorbar(values, list(row), xerr=abs(limits - values), fmt="none", ecolor=plotting.GREY, capsize=3)
    for place, (value, high) in enumerate(zip(values, limits[1], strict=True)):
        axes.annotate(f"{value:.0f}", (high, place), (4, 0), textcoords="offset points", va="center")
    axes.set(xlim=(0, 125), xticks=(0, 50, 100))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
