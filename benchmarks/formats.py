"""The reports of the benchmarks, results/benchmarks.json, and of the agreement with a peer, results/agreement.json.

A section of the benchmarks that has not been run is None.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from utils.formats import (
    Count,
    Document,
    Fraction,
    Name,
    Positive,
    Precision,
    Radius,
    Record,
    Seconds,
    Sha256,
    TestReport,
    Text,
    TotalSeconds,
    TrainingArguments,
    Versions,
)

Ratio = Annotated[float, Meta(ge=0, le=1e18)]  # times faster
Speed = Annotated[float, Meta(ge=0, le=1e18)]  # images per second


class Contender(Record, frozen=True, kw_only=True):
    """One contender of a comparison: medians and interquartile ranges of its rounds."""

    name: Name
    seconds: Seconds
    seconds_iqr: Seconds | None  # None: it ran once or twice, and the seconds are the mean
    images_per_second: Speed | None  # None: not a matter of images
    ratio: Ratio  # how many times faster ours was in the same round
    ratio_iqr: Ratio


Contenders = Annotated[list[Contender], Meta(min_length=2)]  # ours first, then the others


class AttackSpeed(Record, frozen=True, kw_only=True):
    """One attack on batches of one size, ours and the peers'."""

    network: Name = "cnn"
    attack: Name
    batch: Positive
    peers_memory_format: Literal["contiguous_format", "channels_last"]
    rows: Contenders


class SetSpeed(Record, frozen=True, kw_only=True):
    """Adversarial sets against a transform that attacks image by image."""

    epsilons: Positive  # how many radii
    images: Positive
    rows: Contenders


class TrainingSpeed(Record, frozen=True, kw_only=True):
    """One epoch with a defence."""

    defense: Name
    rows: Contenders


class TimedTraining(Record, frozen=True, kw_only=True):
    """Whole trainings, and what they came to."""

    precision: Precision
    epochs: Positive  # of ours
    accuracies: dict[Name, list[Fraction]]  # contender -> an accuracy for each seed
    rows: Contenders


class Growth(Record, frozen=True, kw_only=True):
    """One measurement of how a cost grows with a number or a name: exactly one of the first six fields."""

    width: Positive | None = None
    batch: Positive | None = None
    network: Name | None = None
    images: Positive | None = None
    steps: Positive | None = None
    threads: Positive | None = None
    what: Text  # was measured

    def __post_init__(self) -> None:
        if len(self._axes()) != 1:
            raise ValueError(f"it grows with {len(self._axes())} things instead of one")

    def _axes(self) -> list[str]:
        axes = {name: getattr(self, name) for name in ("width", "batch", "network", "images", "steps", "threads")}
        return [f"{name} {value}" for name, value in axes.items() if value is not None]

    @property
    def axis(self) -> str:
        """What it grows with, and where it was measured: "width 32"."""
        return self._axes()[0]


class SpeedGrowth(Growth, frozen=True, kw_only=True):
    """The speed at one point."""

    images_per_second: Speed


class MemoryGrowth(Growth, frozen=True, kw_only=True):
    """The peak memory of a process at one point."""

    peak_mebibytes: Count


class BenchmarkReport(Document, frozen=True, kw_only=True):
    """results/benchmarks.json."""

    dataset: Literal["cifar10", "digits"]
    device: Text
    cores: Positive
    threads: Positive
    python: Name
    versions: Versions
    quick: bool  # whether it only shows that everything runs; no figure means anything then
    startup: dict[Text, Contenders] | None = None
    attacks: list[AttackSpeed] | None = None
    adversarial_sets: list[SetSpeed] | None = msgspec.field(name="adversarial-sets", default=None)
    training: list[TrainingSpeed] | None = None
    time_to_accuracy: TimedTraining | None = msgspec.field(name="time-to-accuracy", default=None)
    ablation: TimedTraining | None = None
    processes: TimedTraining | None = None
    growth: list[SpeedGrowth] | None = None
    memory: list[MemoryGrowth] | None = None
    profile: dict[Text, dict[Name, Fraction]] | None = None  # what runs -> kind of operation -> its share of the time


class AgreementFigures(Record, frozen=True, kw_only=True):
    """What one library's attacks say of a network."""

    fgsm: Fraction  # the accuracy under FGSM, as under the next three
    pgd: Fraction
    pgd_l2: Fraction
    mi_fgsm: Fraction
    targeted: Fraction  # of the images that PGD leads to the class after their own


class AgreementEntry(Record, frozen=True, kw_only=True):
    """One network under our attacks and the peers'."""

    name: Name
    sha256: Sha256
    ours: AgreementFigures
    peers: AgreementFigures
    pixels: Count
    pixels_that_differ: Count  # in the examples of the two FGSMs

    def agrees(self) -> bool:
        """Whether the figures are as close as benchmarks.agreement says that they should be."""
        names = ("pgd", "pgd_l2", "mi_fgsm", "targeted")
        return (
            self.pixels_that_differ <= self.pixels / 50_000
            and self.ours.fgsm == self.peers.fgsm
            and all(abs(getattr(self.ours, name) - getattr(self.peers, name)) <= 0.01 for name in names)
        )


class AgreementRadii(Record, frozen=True, kw_only=True):
    """The smallest radii at which a network's images fall, by our search and by a peer's."""

    name: Name
    sha256: Sha256
    ours: Radius  # the median
    peers: Radius
    ratio: Annotated[float, Meta(gt=0, le=1e6)]  # ours divided by the peer's: the median over the images

    def agrees(self) -> bool:
        """Whether the radii are as close as benchmarks.agreement says that they should be."""
        return abs(self.ratio - 1) <= 0.05


class AgreementReport(Document, frozen=True, kw_only=True):
    """results/agreement.json."""

    peers: list[Text]  # their names and versions
    torch: Text  # its version
    epsilon: Radius
    epsilon_l2: Radius
    steps: Positive  # of PGD
    examples: Positive
    examples_of_radii: Positive
    entries: list[AgreementEntry] = msgspec.field(name="networks")
    radii: list[AgreementRadii]


class TimeOnGPU(Document, frozen=True, kw_only=True):
    """What the log of a training by `make robust-gpu` does not say. The file lies beside the checkpoint."""

    seconds: TotalSeconds  # with the validation and the writing of files
    validation: Positive  # images attacked or classified after an epoch


class TrainedOnGPU(Record, frozen=True, kw_only=True):
    """One robust network, its training and its test."""

    parameters: Positive
    training: TrainingArguments
    precision: Precision
    training_seconds: TotalSeconds  # of all epochs, without the validation after each
    seconds: TotalSeconds  # with the validation and the writing of files
    validation_accuracy: Fraction
    test: TestReport


class RobustGPUReport(Document, frozen=True, kw_only=True):
    """results/robust-gpu.json."""

    device: Text
    most_seconds: Positive  # of training that each network was allowed
    versions: Versions
    entries: list[TrainedOnGPU] = msgspec.field(name="networks")
