"""The study's two reports, results/study.json and results/robustness.json: their fields, bounds and readers.

Code reads attributes. Two of them have another name in the file: a report's `entries` are its "networks", and an
entry's `architecture` is its "network".
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from study.paper import TRAINING_EPSILONS
from utils.constants import ARCHITECTURES, EPSILONS, UserError
from utils.formats import (
    AttackRow,
    Count,
    Document,
    Fraction,
    Interval,
    Name,
    Positive,
    Precision,
    Radius,
    Record,
    Seed,
    Sha256,
    TotalSeconds,
    TrainingArguments,
    Versions,
    read_document,
)
from utils.quoting import shown
from utils.tables import epsilon_text

Architecture = Literal["cnn", "cnn-lstm"]  # constants.ARCHITECTURES
Part = Literal["study", "reproduction", "spread"]  # of the study: see study.plan


class Measurement(Record, frozen=True, kw_only=True):
    """An accuracy under FGSM at one testing radius; at radius 0, on clean images."""

    epsilon: Radius
    accuracy: Fraction
    confidence_interval: Interval


class StudyEntry(Record, frozen=True, kw_only=True):
    """What the study's report says of one network."""

    part: Part
    name: Name  # of its checkpoint, without the ending
    architecture: Architecture = msgspec.field(name="network")
    training_epsilon: float | None  # the radius of the FGSM examples that it was trained on; None: a baseline
    seed: Seed
    sha256: Sha256  # of the checkpoint
    training: TrainingArguments | None
    precision: Precision
    validation_accuracy: Fraction
    transfer: tuple[Measurement, ...]  # at each of EPSILONS, crafted on the baseline
    white_box: tuple[Measurement, ...]  # at each of EPSILONS, crafted on the network itself
    attack_version: Positive = 1  # of FGSM: see utils.evaluation.ATTACK_VERSIONS
    versions: Versions  # of the libraries that tested it
    threads: Positive  # of the test
    training_seconds: TotalSeconds | None  # of the training steps of all epochs; None: there was no log
    adversarial_set_seconds: TotalSeconds | None = None  # of a baseline's two sets, for the train and the test split
    evaluation_seconds: TotalSeconds  # of both settings

    def __post_init__(self) -> None:
        if self.training_epsilon not in (None, *TRAINING_EPSILONS):
            raise ValueError(f"{shown(self.name)} is not a network of the study: its training_epsilon is another")
        for measurements in (self.transfer, self.white_box):
            if [measurement.epsilon for measurement in measurements] != list(EPSILONS):
                raise ValueError(f"{shown(self.name)} is not tested at the epsilons of the study")
        if self.training_epsilon is None and self.adversarial_set_seconds is None:
            raise ValueError(f"{shown(self.name)} is a baseline without adversarial_set_seconds")

    def under(self, setting: str) -> tuple[Measurement, ...]:
        """The measurements in one setting: "transfer" or "white_box"."""
        return self.transfer if setting == "transfer" else self.white_box

    def at(self, setting: str, epsilon: float) -> Measurement:
        """The measurement in one setting at one of EPSILONS."""
        return self.under(setting)[EPSILONS.index(epsilon)]


class StudyReport(Document, frozen=True, kw_only=True):
    """results/study.json, perhaps before every network is tested."""

    dataset: Literal["cifar10", "digits"]
    split: Literal["test"]
    examples: Positive  # images of the split
    entries: list[StudyEntry] = msgspec.field(name="networks")

    def entries_of(self, part: Part, architecture: str | None = None) -> list[StudyEntry]:
        """The entries of one part of the study, all of them or those of one architecture."""
        return [e for e in self.entries if e.part == part and architecture in (None, e.architecture)]


class WholeStudy(StudyReport, frozen=True, kw_only=True):
    """results/study.json when every network of the part "study" is tested: what tables and figures show."""

    def __post_init__(self) -> None:
        found = [(entry.architecture, entry.training_epsilon) for entry in self.entries_of("study")]
        if found != list(product(ARCHITECTURES, (None, *TRAINING_EPSILONS))):
            raise ValueError("the networks of the study are not all there, in order; python -m study tests them")

    def pairs(self) -> list[tuple[StudyEntry, StudyEntry]]:
        """The CNN's entry and the CNN-LSTM's for each training radius, the baselines first."""
        first, second = (self.entries_of("study", architecture) for architecture in ARCHITECTURES)
        return list(zip(first, second, strict=True))


class RobustnessEntry(Record, frozen=True, kw_only=True):
    """What the report on robustness says of one network."""

    name: Name  # of its checkpoint, without the ending
    architecture: Architecture = msgspec.field(name="network")
    sha256: Sha256  # of the checkpoint
    source_sha256: Sha256  # of the baseline, on which transferred examples are crafted
    parameters: Count
    training: TrainingArguments | None
    precision: Precision
    validation_accuracy: Fraction | None
    versions: Versions  # of the libraries that tested it
    threads: Positive  # of the tests that ran first
    results: list[AttackRow]

    def __post_init__(self) -> None:
        if any(row.examples is None for row in self.results):
            raise ValueError(f"a result of {shown(self.name)} has no number of examples")

    @property
    def defense(self) -> Literal["none", "the study's", "ours"]:
        """Whose defence the network was trained with."""
        name = self.training.defense_name if self.training else None
        return "none" if name is None else "the study's" if name == "fgsm-augment" else "ours"

    @property
    def is_wide(self) -> bool:
        """Whether the network is a robust network's twin: as wide, but trained on clean images alone."""
        return self.defense == "none" and self.name.endswith("-wide")

    def find(self, attack: str, epsilon: float, setting: str = "white_box", **options: Any) -> AttackRow:
        """The result of one attack, on the first images unless `options` say where its images begin.

        Raises UserError if the report does not have it exactly once.
        """
        wanted = {"name": attack, "setting": setting, "epsilon": epsilon, "first": 0, "norm": "linf", **options}
        rows = [row for row in self.results if all(getattr(row, key) == value for key, value in wanted.items())]
        if len(rows) != 1:
            raise UserError(
                f"the report on robustness has {len(rows)} results, instead of one, of {attack}, {setting}, at epsilon "
                f"{epsilon_text(epsilon)} on {shown(self.name)}: python -m study robustness completes it"
            )
        return rows[0]


class RobustnessReport(Document, frozen=True, kw_only=True):
    """results/robustness.json, perhaps before every attack was run."""

    dataset: Literal["cifar10", "digits"]
    split: Literal["train", "validation", "test"]
    entries: Annotated[list[RobustnessEntry], Meta(min_length=1)] = msgspec.field(name="networks")

    def entry(self, name: str) -> RobustnessEntry:
        """The entry of the network of that name. Raises UserError if the report does not have it exactly once."""
        found = [entry for entry in self.entries if entry.name == name]
        if len(found) != 1:
            raise UserError(f"the report on robustness has {len(found)} networks, instead of one, called {shown(name)}")
        return found[0]


def read_study(path: Path) -> StudyReport:
    """The study's report, perhaps a part of it. Raises UserError if the file is not such a report."""
    return read_document(path, StudyReport, "a report of the study")


def read_whole_study(path: Path) -> WholeStudy:
    """The study's report with every network. Raises UserError if the file is not such a report."""
    return read_document(path, WholeStudy, "a report of the whole study")


def read_robustness(path: Path) -> RobustnessReport:
    """The report on robustness, perhaps a part of it. Raises UserError if the file is not such a report."""
    return read_document(path, RobustnessReport, "a report on robustness")


def examples_of(rows: Sequence[AttackRow]) -> int:
    """How many images the first of the attacks was run on."""
    return rows[0].examples or 0
