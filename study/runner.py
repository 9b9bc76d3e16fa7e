"""The study as one computation: it trains and tests what remains of the plan, and writes the report after each test.

A network is tested under FGSM examples crafted on its baseline (transfer) and through its own gradient (white-box).
The report, results/study.json, is described in study/formats.py.
"""

import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import nn

from study.estimate import training_speed
from study.formats import Measurement, StudyEntry, StudyReport, read_study
from study.paper import TRAINING_EPSILONS
from study.plan import Planned, lines
from study.state import State
from utils.adversarial_sets import FOLDER, AdversarialSet, AugmentedSplit, adversarial_set
from utils.checkpoints import check_unchanged, file_digest, load_checkpoint, read_metadata, versions
from utils.constants import EPSILONS, UserError
from utils.data import Split, load_split
from utils.evaluation import ATTACK_VERSIONS, Result, accuracy, evaluate_fgsm
from utils.formats import write_document
from utils.progress import duration
from utils.runs import PartialRun, read_epochs
from utils.training import train


@dataclass
class Study:
    """The study of one data set, in given folders.

    Making it compares the folders with the plan; `run` does what remains. Raises UserError, before anything is trained,
    if an earlier report or checkpoint is damaged, or is of another training or data set.
    """

    dataset: str
    _: KW_ONLY
    models: Path  # folder of the ten networks of the part "study"
    scratch: Path  # folder of the other networks
    report: Path  # the JSON file
    adversarial: Path = FOLDER  # folder of the adversarial sets
    data_dir: Path | str | None = None
    width: int = 32  # of every network
    epochs: int | None = None  # of every training; None: each recipe's own
    device: str = "cpu"
    precision: str = "float32"  # of the trainings, as for `train`
    # Train a network again if its checkpoint is damaged or of another training; otherwise that is an error. The
    # baselines of the part "study" are taken as they are: to train one again, delete its checkpoint.
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self.splits = {name: load_split(self.dataset, name, self.data_dir) for name in ("train", "validation", "test")}
        self.plan = lines(self.dataset, self.models, self.scratch, self.epochs)
        self.speeds: dict[str, float] = {}  # images per second of each architecture's training
        self.entries = {entry.name: entry for entry in self._earlier_entries()}
        self.state = State(self.plan, self.entries, self.splits["train"], self.width, self.overwrite)
        if not self.overwrite:
            self.state.check_baselines_are_there()
        self.todo = self.state.remaining()
        if not self.overwrite:
            self.state.check_no_figures_are_lost(self.report, self.todo)

    def run(self) -> StudyReport:
        """Do what remains, in order, and return the report. It may be interrupted at any time and run again."""
        total = sum(map(len, self.plan))
        for index, planned in enumerate(self.todo):
            trained = self.state.is_trained(planned)
            if not self.quiet:
                number, what = total - len(self.todo) + index + 1, "testing" if trained else "training"
                left = duration(self.seconds_left(index))
                print(f"[{number}/{total}] {what} {planned.path}; for all that remains, about {left}", flush=True)
            if not trained:
                self._train(planned)
            self.entries[planned.name] = self._test(planned)
            self._write()
        return read_study(self.report)

    def pair(self, architecture: str) -> tuple[nn.Module, nn.Module, Split]:
        """A baseline, the network retrained at the largest radius, and the test split, all on the device."""
        paths = {
            planned.epsilon: planned.path
            for line in self.plan
            for planned in line
            if (planned.part, planned.architecture) == ("study", architecture)
        }
        baseline, retrained = (load_checkpoint(paths[e], self.device) for e in (None, max(TRAINING_EPSILONS)))
        return baseline, retrained, self.splits["test"].to(self.device)

    def seconds_left(self, index: int) -> float:
        """Roughly how long todo[index:] takes, from the speed of earlier trainings or of a few steps now."""
        seconds = 0.0
        for planned in self.todo[index:]:
            name = planned.architecture
            if name not in self.speeds:
                self.speeds[name] = training_speed(name, self.width, self.device, self.precision)
            images_per_epoch = len(self.splits["train"]) * (1 if planned.epsilon is None else 2)
            images = self._epochs_left(planned) * images_per_epoch
            images += 5 * len(self.splits["test"])  # both tests together cost as much as so many training images
            seconds += images / self.speeds[name]
        return seconds

    def _epochs_left(self, planned: Planned) -> int:
        if self.state.is_trained(planned):
            return 0
        done = len(PartialRun(planned.path).header().epochs) if self.state.is_resumable(planned) else 0
        return planned.recipe.epochs - done

    def _earlier_entries(self) -> list[StudyEntry]:
        """The entries of the report that is there. Raises UserError if it is of other data."""
        if not self.report.exists():
            return []
        earlier = read_study(self.report)
        if (earlier.dataset, earlier.examples) != (self.dataset, len(self.splits["test"])):
            raise UserError(f"{self.report} is of other data than {self.dataset}: --results names another folder")
        return earlier.entries

    def _write(self) -> None:
        tested = [self.entries[planned.name] for line in self.plan for planned in line if self.state.is_tested(planned)]
        report = StudyReport(
            dataset=self.dataset,  # type: ignore[arg-type]  # the schema checks it when the report is written
            split="test",
            examples=len(self.splits["test"]),
            entries=tested,
        )
        write_document(self.report, report)

    def _adversarial_set(self, planned: Planned, split: str) -> AdversarialSet:
        """The FGSM directions of one split, crafted on the network's baseline."""
        return adversarial_set(
            planned.baseline,
            self.splits[split],
            folder=self.adversarial,
            device=self.device,
            progress=not self.quiet,
        )

    def _train(self, planned: Planned) -> None:
        training: Split | AugmentedSplit = self.splits["train"]
        planned.path.parent.mkdir(parents=True, exist_ok=True)
        if planned.epsilon is not None:
            crafted = self._adversarial_set(planned, "train")
            training = AugmentedSplit(
                self.splits["train"], crafted.direction, planned.epsilon, crafted.manifest.source_sha256
            )
        train(
            planned.architecture,
            training,
            self.splits["validation"],
            planned.recipe,
            output=planned.path,
            width=self.width,
            seed=planned.seed,
            device=self.device,
            precision=self.precision,
            resume=self.state.is_resumable(planned),
            quiet=self.quiet,
        )
        self.speeds[planned.architecture] = read_epochs(planned.path)[-1].images_per_second

    def _test(self, planned: Planned) -> StudyEntry:
        test, sha256 = self.splits["test"].to(self.device), file_digest(planned.path)
        network, header = load_checkpoint(planned.path, self.device), read_metadata(planned.path)
        crafted = self._adversarial_set(planned, "test")
        direction, start = crafted.direction.to(self.device), time.perf_counter()
        transfer = evaluate_fgsm(network, test, EPSILONS[1:], direction=direction, progress=not self.quiet)
        white_box = evaluate_fgsm(network, test, EPSILONS[1:], progress=not self.quiet)
        seconds = max(0.0, time.perf_counter() - start)  # a clock may be set back
        validated = header.validation_accuracy
        if validated is None:  # a baseline that was saved by something else
            validated = accuracy(network, self.splits["validation"].to(self.device))
        epochs = read_epochs(planned.path)
        check_unchanged(planned.path, sha256)
        return StudyEntry(
            part=planned.part,
            name=planned.name,
            architecture=planned.architecture,  # type: ignore[arg-type]  # the schema checks it when the report is written
            training_epsilon=planned.epsilon,
            seed=planned.seed,
            sha256=sha256,
            training=header.training,
            precision=header.precision,
            validation_accuracy=validated,
            transfer=tuple(map(measurement, transfer)),
            white_box=tuple(map(measurement, white_box)),
            attack_version=ATTACK_VERSIONS["fgsm"],
            versions=versions(),
            threads=torch.get_num_threads(),
            training_seconds=round(sum(epoch.seconds for epoch in epochs), 1) if epochs else None,
            adversarial_set_seconds=self._set_seconds(planned) if planned.epsilon is None else None,
            evaluation_seconds=round(seconds, 1),
        )

    def _set_seconds(self, baseline: Planned) -> float:
        """How long it took to craft a baseline's two adversarial sets."""
        return round(sum(self._adversarial_set(baseline, split).manifest.seconds for split in ("train", "test")), 1)


def measurement(result: Result) -> Measurement:
    """What the report says of a result."""
    return Measurement(epsilon=result.epsilon, accuracy=result.accuracy, confidence_interval=result.confidence_interval)
