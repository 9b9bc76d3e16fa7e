"""The study as one computation: baselines, adversarial sets, retrained networks, and what each scores under FGSM.

Its parts are lines of networks. A line is a baseline and the networks retrained on the baseline's FGSM examples; all
are tested on examples crafted on the baseline (transfer) and through their own gradient (white-box). The report is a
JSON object that utils.tables and utils.plotting turn into tables and figures:

    {"dataset": ..., "split": "test", "examples": 10000, "networks": [{"part": "study", "name": "cnn", "network": "cnn",
     "training_epsilon": null, "seed": 0, "sha256": ..., "training": {...}, "validation_accuracy": ...,
     "transfer": [{"epsilon": 0.0, "accuracy": ..., "confidence_interval": [low, high]}, ...], "white_box": [...],
     "training_seconds": ..., "adversarial_set_seconds": ..., "evaluation_seconds": ...}, ...]}
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from networks import NETWORKS
from utils import UserError, checkpoint_stem
from utils.adversarial import AugmentedSplit, adversarial_set
from utils.allocator import keep_freed_memory
from utils.checkpoints import file_digest, load_checkpoint, read_metadata, versions, write_atomically
from utils.data import load_split
from utils.evaluation import evaluate_fgsm
from utils.paper import EPSILONS, TRAINING_EPSILONS
from utils.recipes import RECIPES
from utils.training import PartialRun, check_same_arguments, cross_entropy, train, training_arguments

SPREAD_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Line:
    """A baseline and the networks retrained on its FGSM examples."""

    part: str  # "study", "reproduction" or "spread"
    network: str
    recipes: dict  # training epsilon (None: the baseline) -> Recipe
    seed: int
    folder: Path
    stem: str  # of the baseline's file; the retrained networks' begin with it

    def path(self, epsilon=None):
        return self.folder / (checkpoint_stem(self.stem, epsilon) + ".safetensors")


def lines(dataset, models, scratch, epochs=None):
    """The study's lines. models: folder of the ten networks of its tables; scratch: of those that are not shipped.

    epochs: replaces every recipe's, for a quick look.
    """
    baseline, paper, short = (RECIPES[name] for name in ("long", "paper", "short"))
    small, large = RECIPES["retrain"], RECIPES["one-cycle"]  # at 0.2 there is more to learn
    if dataset == "digits":  # so few images need fewer steps
        baseline, large, paper = (replace(recipe, epochs=n) for recipe, n in ((large, 15), (large, 8), (paper, 5)))
    if epochs:
        baseline, small, large, paper, short = (
            replace(recipe, epochs=epochs) for recipe in (baseline, small, large, paper, short)
        )

    def recipes(baseline, retrained):
        return {None: baseline, **{epsilon: recipe.with_defense() for epsilon, recipe in retrained.items()}}

    whole = recipes(baseline, {epsilon: large if epsilon == 0.2 else small for epsilon in TRAINING_EPSILONS})
    both = ("cnn", "cnn-lstm")
    return [
        *(Line("study", name, whole, 0, models, name) for name in both),
        *(Line("reproduction", name, recipes(paper, {0.2: paper}), 0, scratch, f"{name}-paper") for name in both),
        *(Line("spread", "cnn", recipes(short, {0.2: short}), s, scratch, f"cnn-short-seed-{s}") for s in SPREAD_SEEDS),
    ]


class Study:
    """What of the study is done, what remains, and how to do it; the report grows with every tested network."""

    def __init__(
        self,
        dataset,
        *,
        models,
        scratch,
        report,
        data_dir=None,
        width=32,
        epochs=None,
        device="cpu",
        overwrite=False,
        quiet=False,
    ):
        """models, scratch, epochs: as for `lines`. report: path of the JSON file. width: of every network.

        overwrite: train again what was trained with other arguments; without it, that is an error.
        Raises UserError, before anything is trained, if an earlier report or checkpoint is not what it should be.
        """
        self.splits = {name: load_split(dataset, name, data_dir) for name in ("train", "validation", "test")}
        self.lines = lines(dataset, models, scratch, epochs)
        self.path, self.width, self.device = report, width, device
        self.overwrite, self.quiet = overwrite, quiet
        self.entries = {entry["name"]: entry for entry in read_report(report)["networks"]} if report.exists() else {}
        self.speeds = {}  # training images/s of each network
        self.todo = [
            (line, epsilon)
            for line in self.lines
            if not self._line_is_done(line)
            for epsilon in line.recipes
            if not (self._is_trained(line, epsilon) and self._is_tested(line, epsilon))
        ]

    def run(self):
        """Do what remains, in order, and return the report. It may be interrupted anywhere and run again."""
        total = sum(len(line.recipes) for line in self.lines)
        for index, (line, epsilon) in enumerate(self.todo):
            trained = self._is_trained(line, epsilon)
            self._say(
                f"[{total - len(self.todo) + index + 1}/{total}] {'testing' if trained else 'training'} "
                f"{line.path(epsilon)}; for all that remains, about {duration(self._seconds_left(index))}"
            )
            if not trained:
                self._train(line, epsilon)
            self.entries[line.path(epsilon).stem] = self._test(line, epsilon)
            self._write()
        self._write()
        return read_report(self.path)

    def pair(self, network):
        """The baseline and the network retrained on the largest epsilon, and the test split, to be looked at."""
        (line,) = (line for line in self.lines if (line.part, line.network) == ("study", network))
        paths = line.path(), line.path(max(TRAINING_EPSILONS))
        return *(load_checkpoint(path, self.device) for path in paths), self.splits["test"].to(self.device)

    def _say(self, text):
        if not self.quiet:
            print(text, flush=True)

    def _write(self):
        report = {
            "dataset": self.splits["test"].dataset,
            "split": "test",
            "examples": len(self.splits["test"]),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "networks": [
                self.entries[line.path(epsilon).stem]
                for line in self.lines
                for epsilon in line.recipes
                if self._is_tested(line, epsilon)
            ],
        }
        write_atomically(self.path, (json.dumps(report, indent=1) + "\n").encode())

    def _arguments(self, line, epsilon, source_sha256):
        training = self.splits["train"]
        if epsilon is not None:
            training = AugmentedSplit(training, None, epsilon, source_sha256)  # no need of its images
        return training_arguments(line.network, training, line.recipes[epsilon], width=self.width, seed=line.seed)

    def _line_is_done(self, line):
        """Whether every network of a line that is not shipped has been tested, be its checkpoint still there or not."""
        return line.part != "study" and all(self._is_tested(line, e) for e in line.recipes)

    def _is_tested(self, line, epsilon):
        """Whether the report has the figures of the checkpoint that is there, or that would be there."""
        entry, path = self.entries.get(line.path(epsilon).stem), line.path(epsilon)
        if entry is None or (path.exists() and entry["sha256"] != file_digest(path)):
            return False
        if epsilon is None and line.part == "study":
            return True  # any baseline is taken
        source = self.entries.get(line.path().stem, {}).get("sha256")
        return entry["training"] == self._arguments(line, epsilon, source)

    def _is_trained(self, line, epsilon):
        """Whether the finished checkpoint is there. Raises UserError if another one is, unless told to overwrite.

        A baseline of the study proper is taken as it is, however it was trained.
        """
        path, run = line.path(epsilon), PartialRun(line.path(epsilon))
        if epsilon is not None and not line.path().exists():
            return False
        if run.exists():
            self._is_as_wanted(line, epsilon, run.state, run.arguments())
            return False
        if not path.exists():
            return False
        metadata = read_metadata(path)
        if epsilon is None and line.part == "study":
            if (metadata["network"], metadata["dataset"]) != (line.network, self.splits["train"].dataset):
                raise UserError(f"{path} is no {line.network} trained on {self.splits['train'].dataset}")
            return True
        return self._is_as_wanted(line, epsilon, path, metadata.get("training"))

    def _is_as_wanted(self, line, epsilon, path, arguments):
        source = None if epsilon is None else file_digest(line.path())
        try:
            check_same_arguments(path, arguments, self._arguments(line, epsilon, source))
        except UserError as error:
            if self.overwrite:
                return False
            raise UserError(f"{error}; --overwrite trains it again") from None
        return True

    def _adversarial_set(self, line, split):
        return adversarial_set(line.path(), self.splits[split], device=self.device, progress=not self.quiet)

    def _train(self, line, epsilon):
        training, path, run = self.splits["train"], line.path(epsilon), PartialRun(line.path(epsilon))
        path.parent.mkdir(parents=True, exist_ok=True)
        resume = run.exists() and self._is_as_wanted(line, epsilon, run.state, run.arguments())
        if epsilon is not None:
            signs = self._adversarial_set(line, "train")
            training = AugmentedSplit(training, signs.direction, epsilon, signs.manifest["source_sha256"])
        train(
            line.network,
            training,
            self.splits["validation"],
            line.recipes[epsilon],
            output=path,
            width=self.width,
            seed=line.seed,
            device=self.device,
            resume=resume,
            quiet=self.quiet,
        )
        self.speeds[line.network] = read_log(path)[-1]["images_per_second"]

    def _test(self, line, epsilon):
        path, test = line.path(epsilon), self.splits["test"].to(self.device)
        start = time.perf_counter()
        network, metadata = load_checkpoint(path, self.device), read_metadata(path)
        signs = self._adversarial_set(line, "test")
        if epsilon is None:
            made = signs.manifest["seconds"] + self._adversarial_set(line, "train").manifest["seconds"]
        direction = signs.direction.to(self.device)
        transfer = evaluate_fgsm(network, test, EPSILONS[1:], direction=direction, progress=not self.quiet)
        white_box = evaluate_fgsm(network, test, EPSILONS[1:], progress=not self.quiet)
        return {
            "part": line.part,
            "name": path.stem,
            "network": line.network,
            "training_epsilon": epsilon,
            "seed": line.seed,
            "sha256": file_digest(path),
            "training": metadata.get("training"),
            "validation_accuracy": metadata.get("validation_accuracy"),
            "transfer": [as_json(result) for result in transfer],
            "white_box": [as_json(result) for result in white_box],
            "training_seconds": round(sum(epoch["seconds"] for epoch in read_log(path)), 1),
            "evaluation_seconds": round(time.perf_counter() - start, 1),
            **({"adversarial_set_seconds": round(made, 1)} if epsilon is None else {}),
        }

    def _seconds_left(self, index):
        """Roughly, from the speed of the trainings so far or of a few steps now: what todo[index:] will take."""
        seconds = 0
        for line, epsilon in self.todo[index:]:
            if line.network not in self.speeds:
                self.speeds[line.network] = training_speed(line.network, self.width, self.device)
            images = 5 * len(self.splits["test"])  # both evaluations, in terms of training steps
            if not self._is_trained(line, epsilon):
                epochs = line.recipes[epsilon].epochs - PartialRun(line.path(epsilon)).finished_epochs()
                images += epochs * len(self.splits["train"]) * (1 if epsilon is None else 2)
            seconds += images / self.speeds[line.network]
        return seconds


def as_json(result):
    return {
        "epsilon": result.epsilon,
        "accuracy": result.accuracy,
        "confidence_interval": result.confidence_interval,
    }


def read_report(path):
    """The report in a JSON file. Raises UserError unless it is one that `Study` wrote."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        for entry in report["networks"]:
            _ = entry["part"], entry["name"], entry["network"], entry["training_epsilon"], entry["sha256"]
            _ = entry["training"], [float(row["accuracy"]) for row in entry["transfer"] + entry["white_box"]]
        return report
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no report of a study ({type(error).__name__}: {error}); delete it") from error


def read_log(path):
    """The epochs in the log beside a checkpoint; none if there is no log."""
    log = Path(path).with_suffix(".jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]] if log.exists() else []


def training_speed(name, width, device):
    """Images/s of a few training steps of a fresh network, once it has warmed up."""
    keep_freed_memory()
    network = NETWORKS[name](width).to(device, memory_format=torch.channels_last)
    images, labels = torch.rand(128, 3, 32, 32, device=device), torch.zeros(128, dtype=torch.int64, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    for step in range(13):
        if step == 5:
            start = time.perf_counter()
        cross_entropy(network, images, labels).backward()
    return 8 * len(labels) / (time.perf_counter() - start)


def duration(seconds):
    """As people say it: 40 s, 12 min, 1 h 40 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
