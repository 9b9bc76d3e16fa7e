"""What baseline, the study's defence and ours hold under every attack, transferred FGSM to AutoAttack: one report.

    {"dataset": ..., "split": "test", "networks": [{"name": "cnn-robust", "network": "cnn", "sha256": ...,
     "source_sha256": ..., "parameters": 788490, "training": {...}, "precision": ..., "validation_accuracy": ...,
     "versions": {...}, "threads": 2, "results": [{"name": "pgd", "setting": "white_box", "epsilon": 0.0313725,
     "steps": 50, ..., "examples": 1000, "accuracy": ..., "confidence_interval": [low, high], "seconds": ...}, ...]},
     ...]}

FGSM at epsilon 0 is the clean accuracy. Transferred examples are crafted on the baseline of the same architecture.
utils.tables and utils.plotting turn the report into tables and figures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from study.formats import read_robustness as read_report
from utils.checkpoints import file_digest, read_metadata, versions
from utils.constants import ARCHITECTURES, EPSILONS, PGD_20, RADIUS, UserError
from utils.evaluation import evaluate, evaluate_fgsm, report_row
from utils.files import write_atomically
from utils.notes import Notes
from utils.runs import read_log

RADII = sorted([*(levels / 255 for levels in (2, 4, 8, 12, 16)), *EPSILONS[1:]])


PGD_50 = {"steps": 50, "restarts": 10, "seed": 0}


AUTOATTACK = {"seed": 0}


ENDINGS = ("", "-fgsm-augment-0.2", "-robust")  # of a checkpoint's name, after its architecture


def checkpoint_paths(models):
    """(architecture, path) of each of the six networks, the baseline of an architecture first."""
    return [(name, Path(models) / f"{name}{ending}.safetensors") for name in ARCHITECTURES for ending in ENDINGS]


@dataclass(frozen=True)
class Test:
    """One attack with its options, at all radii in one pass for FGSM."""

    attack: str
    setting: str
    radii: tuple
    options: dict
    examples: int

    def find(self, rows):
        """Its results among those of an earlier report; none unless all are there."""
        wanted = {"setting": self.setting, "examples": self.examples, **self.options}
        rows = [row for row in rows if row["name"] == self.attack and wanted.items() <= row.items()]
        rows = [row for row in rows if row["epsilon"] in self.radii]
        return rows if len(rows) == len(self.radii) else []

    def run(self, network, source, split, notes, progress):
        crafter = source if self.setting == "transfer" else None
        if self.attack == "fgsm":
            _, *results = evaluate_fgsm(network, split, self.radii, source=crafter, progress=progress)
        else:
            options = {"options": self.options, "notes": notes, "progress": progress}
            results = [evaluate(network, split.first(self.examples), self.attack, *self.radii, **options)]
        return [report_row(result, self.setting) for result in results]


def tests(everything, examples):
    """In order: FGSM on `everything`, so many images, and whatever iterates on `examples` of them."""
    return [
        Test("fgsm", "white_box", (0.0, *RADII), {}, everything),
        Test("fgsm", "transfer", (0.0, *RADII), {}, everything),
        *(Test("pgd", "white_box", (radius,), PGD_20, examples) for radius in RADII),
        Test("pgd", "white_box", (RADIUS,), PGD_50, examples),
        Test("autoattack", "white_box", (RADIUS,), AUTOATTACK, examples),
    ]


def measure(networks, split, path, *, examples=1000, overwrite=False, quiet=False):
    """Test all networks, write the report to `path` after each test, and return it.

    networks: {path of a checkpoint: (architecture, network)}, the baseline of an architecture before its others.
    split: Split, on the networks' device. FGSM is run on all of it, whatever iterates on the first `examples` images.
    What the report at `path` says already, of the same checkpoints, attacks and versions, is not measured again.
    Raises UserError if the report there says something else too, which would be lost; `overwrite` lets it go.
    """
    report = {"dataset": split.dataset, "split": split.name, "networks": []}
    earlier = read_report(path)["networks"] if path.exists() else []
    plan = tests(len(split), min(examples, len(split)))
    sources: dict[str, tuple] = {}
    done = []
    for checkpoint, (architecture, network) in networks.items():
        metadata = read_metadata(checkpoint)
        entry = {
            "name": checkpoint.stem,
            "network": architecture,
            "sha256": file_digest(checkpoint),
            "source_sha256": sources.setdefault(architecture, (network, file_digest(checkpoint)))[1],
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "training": metadata.get("training"),
            "precision": metadata.get("precision", "float32"),
            "validation_accuracy": metadata.get("validation_accuracy"),
            "versions": versions("pyautoattack"),
            "threads": torch.get_num_threads(),
        }
        same = {key: value for key, value in entry.items() if key != "threads"}  # which change no figure
        known = [row for other in earlier if same.items() <= other.items() for row in other["results"]]
        done.append([test.find(known) for test in plan])
        report["networks"].append(entry)
    lost = sum(len(entry["results"]) for entry in earlier) - sum(len(rows) for tests in done for rows in tests)
    if lost and not overwrite:
        raise UserError(
            f"{path} holds {lost} figures of other checkpoints, versions or numbers of images, which would be lost: "
            "--results names another folder, --overwrite replaces them"
        )
    notes = Notes(path.with_suffix(".partial.jsonl"))

    def write():
        for entry, rows in zip(report["networks"], done, strict=True):
            entry["results"] = [row for of_a_test in rows for row in of_a_test]
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())

    for entry, rows, (architecture, network) in zip(report["networks"], done, networks.values(), strict=True):
        for index, test in enumerate(plan):
            if not rows[index]:
                if not quiet:
                    print(
                        f"{entry['name']}, test {index + 1} of {len(plan)}: {test.attack}, {test.setting}", flush=True
                    )
                rows[index] = test.run(network, sources[architecture][0], split, notes, not quiet)
                write()
    write()
    notes.finish()
    return read_report(path)


def training_logs(models, results):
    """Logs of defended trainings, {"defenses": [...], "overfitting": [...], "tried": [...]}, of the folders named so.

    Those of the shipped networks are among what was tried. Raises TrainingError if a file there is no such log.
    """

    def logs(paths):
        keys = ("robust_accuracy", "choosing_accuracy")
        found = (read_log(path, *keys) for path in sorted(paths))
        return [log for log in found if isinstance(log[0]["defense"], dict) and "epsilon" in log[0]["defense"]]

    def by_settings(log):
        return log[0]["defense"]["name"], log[0]["defense"]["epsilon"], log[0]["width"]

    shipped = [path.with_suffix(".jsonl") for _, path in checkpoint_paths(models) if path.stem.endswith("-robust")]
    return {
        "defenses": logs((results / "defenses").glob("*.jsonl")),
        "overfitting": sorted(logs((results / "overfitting").glob("*.jsonl")), key=by_settings),
        "tried": logs((results / "tried").glob("*-n-fgsm-*.jsonl")) + logs(path for path in shipped if path.exists()),
    }
