"""The study as one computation: baselines, adversarial sets, retrained networks, and what each scores under FGSM.

Its parts are lines of networks. A line is a baseline and the networks retrained on the baseline's FGSM examples; all
are tested on examples crafted on the baseline (transfer) and through their own gradient (white-box). The report is a
JSON object that utils.tables and utils.plotting turn into tables and figures:

    {"dataset": ..., "split": "test", "examples": 10000, "networks": [{"part": "study", "name": "cnn", "network": "cnn",
     "training_epsilon": null, "seed": 0, "sha256": ..., "training": {...}, "precision": "float32",
     "validation_accuracy": ...,
     "transfer": [{"epsilon": 0.0, "accuracy": ..., "confidence_interval": [low, high]}, ...], "white_box": [...],
     "versions": {...}, "threads": 2, "training_seconds": ..., "adversarial_set_seconds": ...,
     "evaluation_seconds": ...}, ...]}

training_seconds sums the training steps of all epochs, from the log, and is null without one; adversarial_set_seconds
is for the train and the test split, once for a baseline; evaluation_seconds is for both settings. Versions and threads
are those of the test.
"""

import json
import time

import torch

from networks import NETWORKS
from study.formats import read_study as read_report
from study.paper import TRAINING_EPSILONS
from study.plan import lines
from utils.adversarial_sets import FOLDER, AugmentedSplit, adversarial_set
from utils.allocator import keep_freed_memory
from utils.checkpoints import file_digest, load_checkpoint, read_header, read_metadata, versions
from utils.constants import EPSILONS, UserError
from utils.data import load_split
from utils.evaluation import accuracy, evaluate_fgsm
from utils.files import write_atomically
from utils.runs import PartialRun, argument_differences, check_same_arguments, training_arguments
from utils.runs import read_epochs as read_log
from utils.training import cross_entropy, train


class Study:
    """What of the study is done, what remains, and how to do it; the report grows with every tested network."""

    def __init__(
        self,
        dataset,
        *,
        models,
        scratch,
        report,
        adversarial=FOLDER,
        data_dir=None,
        width=32,
        epochs=None,
        device="cpu",
        precision="float32",
        overwrite=False,
        quiet=False,
    ):
        """models, scratch, epochs: as for `lines`. report: path of the JSON file. width: of every network.
        adversarial: folder of the adversarial sets.
        precision: of the trainings, as for `train`.
        overwrite: train again what was trained with other arguments, or is damaged; without it, that is an error. The
        baselines of the study proper are taken as they are: to train one again, delete it.
        Raises UserError, before anything is trained, if an earlier report or checkpoint is not what it should be.
        """
        self.splits = {name: load_split(dataset, name, data_dir) for name in ("train", "validation", "test")}
        self.lines = lines(dataset, models, scratch, epochs)
        self.path, self.width, self.device, self.precision = report, width, device, precision
        self.overwrite, self.quiet, self.adversarial = overwrite, quiet, adversarial
        self.about = {"dataset": dataset, "split": "test", "examples": len(self.splits["test"])}
        earlier = read_report(report) if report.exists() else {**self.about, "networks": []}
        if {key: earlier[key] for key in self.about} != self.about:
            raise UserError(f"{report} is of other data than {dataset}: --results names another folder")
        self.entries = {entry["name"]: entry for entry in earlier["networks"]}
        self.speeds: dict[str, float] = {}  # training images/s of each network
        for line in self.lines:
            orphans = [line.path(e) for e in line.recipes if e is not None and line.path(e).exists()]
            if orphans and not line.path().exists() and not (overwrite or self._line_is_done(line)):
                raise UserError(
                    f"{orphans[0]} is there, but not {line.path()}, on whose examples it was trained: put that back, "
                    "or --overwrite trains them all again"
                )
        self.todo = [
            (line, epsilon)
            for line in self.lines
            if not self._line_is_done(line)
            for epsilon in line.recipes
            if not (self._is_trained(line, epsilon) and self._is_tested(line, epsilon))
        ]
        if not overwrite:
            self._check_nothing_is_dropped()

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
        tested = [
            self.entries[line.path(epsilon).stem]
            for line in self.lines
            for epsilon in line.recipes
            if self._is_tested(line, epsilon)
        ]
        report = {**self.about, "networks": tested}
        write_atomically(self.path, (json.dumps(report, indent=1) + "\n").encode())

    def _check_nothing_is_dropped(self):
        """Raise UserError if the report has figures of a network that is gone and would be trained otherwise."""
        for line, epsilon in self.todo:
            path, entry = line.path(epsilon), self.entries.get(line.path(epsilon).stem)
            if entry and not path.exists() and (differences := self._differences(line, epsilon)):
                raise UserError(
                    f"{self.path} has figures of {path} from another training: {'; '.join(differences)}; --overwrite "
                    "replaces them, --results names another folder"
                )

    def _differences(self, line, epsilon):
        """What differs between the training that the report tells of and the wanted one, a phrase each."""
        source = self.entries.get(line.path().stem, {}).get("sha256")
        found = self.entries[line.path(epsilon).stem]["training"]
        return argument_differences(found, self._arguments(line, epsilon, source))

    def _arguments(self, line, epsilon, source_sha256):
        training = self.splits["train"]
        if epsilon is not None:
            training = AugmentedSplit(training, torch.empty(0), epsilon, source_sha256)  # of no images
        return training_arguments(line.network, training, line.recipes[epsilon], width=self.width, seed=line.seed)

    def _line_is_done(self, line):
        """Whether every network of a line that is not shipped has been tested, be its checkpoint still there or not."""
        return line.part != "study" and all(self._is_tested(line, e) for e in line.recipes)

    def _is_tested(self, line, epsilon):
        """Whether the report has the figures of the checkpoint that is there, or that would be there."""
        entry, path = self.entries.get(line.path(epsilon).stem), line.path(epsilon)
        if entry is None or (path.exists() and entry["sha256"] != file_digest(path)):
            return False
        if epsilon is None and line.part == "study" and path.exists():
            return True  # any baseline is taken
        return not self._differences(line, epsilon)

    def _is_trained(self, line, epsilon):
        """Whether the finished checkpoint is there. Raises UserError if another one is, unless told to overwrite."""
        path = line.path(epsilon)
        if epsilon is not None and not line.path().exists():
            return False
        if self._is_resumable(line, epsilon):
            return False
        if epsilon is None and line.part == "study" and path.exists():  # taken as it is, however it was trained
            metadata, wanted = read_metadata(path), (line.network, self.about["dataset"], self.width)
            if (metadata["network"], metadata["dataset"], metadata["arguments"]["width"]) != wanted:
                raise UserError(f"{path} is no {wanted[0]} of width {wanted[2]} trained on {wanted[1]}")
            return True
        return path.exists() and not PartialRun(path).exists() and self._is_as_wanted(line, epsilon, path)

    def _is_resumable(self, line, epsilon):
        """Whether there is an interrupted run of the wanted training. Raises UserError as above."""
        run = PartialRun(line.path(epsilon))
        return run.exists() and self._is_as_wanted(line, epsilon, run.state)

    def _is_as_wanted(self, line, epsilon, path):
        """Whether a checkpoint or the state of a run is of the wanted training. Raises UserError as above."""
        source = None if epsilon is None else file_digest(line.path())
        try:
            header = read_header(path)
            found = header.get("training", header.get("arguments"))
            check_same_arguments(path, found, self._arguments(line, epsilon, source))
        except UserError as error:
            if self.overwrite:
                return False
            raise UserError(
                f"{error}; --overwrite trains it again, --models or --scratch names another folder"
            ) from None
        return True

    def _adversarial_set(self, line, split):
        options = {"folder": self.adversarial, "device": self.device, "progress": not self.quiet}
        return adversarial_set(line.path(), self.splits[split], **options)

    def _train(self, line, epsilon):
        training, path = self.splits["train"], line.path(epsilon)
        path.parent.mkdir(parents=True, exist_ok=True)
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
            precision=self.precision,
            resume=self._is_resumable(line, epsilon),
            quiet=self.quiet,
        )
        self.speeds[line.network] = read_log(path)[-1]["images_per_second"]

    def _test(self, line, epsilon):
        path, test = line.path(epsilon), self.splits["test"].to(self.device)
        network, metadata = load_checkpoint(path, self.device), read_metadata(path)
        signs = self._adversarial_set(line, "test")
        epochs = read_log(path)
        times = {"training_seconds": round(sum(epoch["seconds"] for epoch in epochs), 1) if epochs else None}
        if epsilon is None:
            made = signs.manifest["seconds"] + self._adversarial_set(line, "train").manifest["seconds"]
            times["adversarial_set_seconds"] = round(made, 1)
        validated = metadata.get("validation_accuracy")
        if validated is None:  # a baseline that something else has saved
            validated = accuracy(network, self.splits["validation"].to(self.device))
        direction, start = signs.direction.to(self.device), time.perf_counter()
        transfer = evaluate_fgsm(network, test, EPSILONS[1:], direction=direction, progress=not self.quiet)
        white_box = evaluate_fgsm(network, test, EPSILONS[1:], progress=not self.quiet)
        times["evaluation_seconds"] = round(time.perf_counter() - start, 1)
        return {
            "part": line.part,
            "name": path.stem,
            "network": line.network,
            "training_epsilon": epsilon,
            "seed": line.seed,
            "sha256": file_digest(path),
            "training": metadata.get("training"),
            "precision": metadata.get("precision", "float32"),  # all that were made before it was recorded
            "validation_accuracy": validated,
            "transfer": [as_json(result) for result in transfer],
            "white_box": [as_json(result) for result in white_box],
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **times,
        }

    def _seconds_left(self, index):
        """Roughly, from the speed of the trainings so far or of a few steps now: what todo[index:] will take."""
        seconds = 0
        for line, epsilon in self.todo[index:]:
            if line.network not in self.speeds:
                self.speeds[line.network] = training_speed(line.network, self.width, self.device, self.precision)
            images = self._epochs_left(line, epsilon) * len(self.splits["train"]) * (1 if epsilon is None else 2)
            images += 5 * len(self.splits["test"])  # both evaluations, in terms of training steps
            seconds += images / self.speeds[line.network]
        return seconds

    def _epochs_left(self, line, epsilon):
        if self._is_trained(line, epsilon):
            return 0
        wanted = line.recipes[epsilon].epochs
        if not self._is_resumable(line, epsilon):
            return wanted
        return wanted - len(read_header(PartialRun(line.path(epsilon)).state)["epochs"])


def as_json(result):
    return {
        "epsilon": result.epsilon,
        "accuracy": result.accuracy,
        "confidence_interval": result.confidence_interval,
    }


def training_speed(name, width, device, precision):
    """Images/s of a few training steps of a fresh network, once it has warmed up."""
    keep_freed_memory()
    network = NETWORKS[name](width).to(device).to(memory_format=torch.channels_last)
    images, labels = torch.rand(128, 3, 32, 32, device=device), torch.zeros(128, dtype=torch.int64, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    for step in range(13):
        if step == 5:
            _wait(network)
            start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = cross_entropy(network, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait(network)
    return 8 * len(labels) / (time.perf_counter() - start)


def _wait(network):
    """Until a GPU has done all that the network's parameters depend on."""
    next(network.parameters()).sum().item()


def duration(seconds):
    """As people say it: 40 s, 12 min, 1 h 40 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
