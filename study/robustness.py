"""The report on robustness: the baselines, the study's defence and ours under every attack, results/robustness.json.

FGSM at epsilon 0 is the clean accuracy. Transferred examples are crafted on the baseline of the same architecture.
The report is described in study/formats.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import nn

from study.formats import RobustnessEntry, RobustnessReport, read_robustness
from utils.checkpoints import check_unchanged, file_digest, load_checkpoint, read_metadata, versions
from utils.commands.checkpoints import overwrite_advice
from utils.constants import ARCHITECTURES, EPSILONS, L2_RADIUS, PGD_20, RADIUS, UserError
from utils.data import Split
from utils.evaluation import ATTACK_VERSIONS, evaluate, evaluate_fgsm, report_row
from utils.files import beside
from utils.formats import AttackRow, TestReport, read_document, write_document
from utils.notes import Notes, notes_beside
from utils.runs import Log, read_log
from utils.tables import epsilon_text

RADII = sorted([*(levels / 255 for levels in (2, 4, 8, 12, 16)), *EPSILONS[1:]])
PGD_50 = {"steps": 50, "restarts": 10, "seed": 0}
PGD_L2 = {**PGD_50, "norm": "l2", "loss": "margin"}  # the networks did not train for this threat
AUTOATTACK = {"seed": 0}
STRONG = {"seed": 0}
# The endings of a checkpoint's name. A network with "-wide" has the width and the activation of the robust one.
# It learnt from clean images alone.
VARIANTS = ("", "-fgsm-augment-0.2", "-wide", "-robust")


def checkpoint_paths(models: Path, *, wide: bool = True) -> list[tuple[str, Path]]:
    """The architecture and the path of each network, the baseline of an architecture first.

    wide: whether to add the "-wide" networks that exist. On digits the baselines are as wide as the robust networks, so
    they do not exist there.
    """
    paths = [(name, models / f"{name}{ending}.safetensors") for name in ARCHITECTURES for ending in VARIANTS]
    return [(name, path) for name, path in paths if not path.stem.endswith("-wide") or (wide and path.exists())]


@dataclass(frozen=True)
class Test:
    """One attack with its options; FGSM is run at all its radii in one pass."""

    __test__ = False  # pytest takes a class called Test... for tests

    attack: str
    setting: str  # "white_box" or "transfer"
    radii: tuple[float, ...]
    options: Mapping[str, Any]
    examples: int
    first: int = 0  # position in the split of the first image

    def find(self, rows: Iterable[AttackRow]) -> list[AttackRow]:
        """Its results among those of an earlier report; [] unless all are there."""
        version = ATTACK_VERSIONS[self.attack]
        wanted = {
            "name": self.attack,
            "version": version,
            "setting": self.setting,
            "first": self.first,
            "examples": self.examples,
            "norm": "linf",
            **self.options,
        }
        found = [
            row
            for row in rows
            if row.epsilon in self.radii and all(getattr(row, key) == value for key, value in wanted.items())
        ]
        return found if len(found) == len(self.radii) else []

    def run(
        self, network: nn.Module, baseline: nn.Module, split: Split, notes: Notes, *, progress: bool
    ) -> list[AttackRow]:
        """Run the attack on its images of the split. baseline: crafts transferred examples."""
        source = baseline if self.setting == "transfer" else None
        tested = split.between(self.first, self.first + self.examples)
        if self.attack == "fgsm":
            _, *results = evaluate_fgsm(network, tested, self.radii, source=source, progress=progress)
        else:
            options = dict(self.options)
            results = [
                evaluate(network, tested, self.attack, radius, options=options, notes=notes, progress=progress)
                for radius in self.radii
            ]
        return [replace(report_row(result, self.setting), first=self.first) for result in results]


def tests(everything: int, examples: int) -> list[Test]:
    """All tests in order.

    FGSM gets `everything`, the number of all images. PGD and AutoAttack get the first `examples` of them. AutoAttack
    also gets as many that come after these. The strong attack gets the first 10 * `examples`. They get fewer images if
    fewer exist.
    """
    examples = min(examples, everything)
    following = min(examples, everything - examples)
    planned = [
        Test("fgsm", "white_box", (0.0, *RADII), {}, everything),
        Test("fgsm", "transfer", (0.0, *RADII), {}, everything),
        *(Test("pgd", "white_box", (radius,), PGD_20, examples) for radius in RADII),
        Test("pgd", "white_box", (RADIUS,), PGD_50, examples),
        Test("pgd", "white_box", (L2_RADIUS,), PGD_L2, examples),
        Test("autoattack", "white_box", (RADIUS,), AUTOATTACK, examples),
        Test("autoattack", "white_box", (RADIUS,), AUTOATTACK, following, first=examples),
        Test("strong", "white_box", (RADIUS,), STRONG, min(10 * examples, everything)),
    ]
    return [test for test in planned if test.examples]


class Results:
    """The results so far: of each network, in the order of `tests`; a test that is not done has no results."""

    def __init__(
        self, networks: Mapping[Path, nn.Module], plan: Sequence[Test], earlier: Sequence[RobustnessEntry]
    ) -> None:
        self.baselines: dict[str, Path] = {}  # architecture -> the checkpoint that comes first
        self.entries = []
        self.done = []
        for path, network in networks.items():
            entry = self._entry(path, network)
            known = _known(entry, earlier)
            self.done.append([test.find(known.results) for test in plan])
            self.entries.append(replace(entry, threads=known.threads) if any(self.done[-1]) else entry)

    def _entry(self, path: Path, network: nn.Module) -> RobustnessEntry:
        header = read_metadata(path)
        baseline = self.baselines.setdefault(header.network, path)
        sha256, weights = file_digest(path), load_checkpoint(path).state_dict()
        if not all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in network.state_dict().items()):
            raise UserError(f"{path} was replaced after it was loaded: run the command again")
        return RobustnessEntry(
            name=path.stem,
            architecture=header.network,  # type: ignore[arg-type]  # the schema checks it when the report is written
            sha256=sha256,
            source_sha256=file_digest(baseline),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            training=header.training,
            precision=header.precision,
            validation_accuracy=header.validation_accuracy,
            versions=versions("pyautoattack"),
            threads=torch.get_num_threads(),
            results=[],
        )

    def report(self, split: Split) -> RobustnessReport:
        """The report on what is done so far."""
        entries = [
            replace(entry, results=[row for rows in done for row in rows])
            for entry, done in zip(self.entries, self.done, strict=True)
        ]
        return RobustnessReport(
            dataset=split.dataset,  # type: ignore[arg-type]  # the schema checks it when the report is written
            split=split.name,  # type: ignore[arg-type]
            entries=entries,
        )


def _known(entry: RobustnessEntry, earlier: Sequence[RobustnessEntry]) -> RobustnessEntry:
    """The entry of the same checkpoint, tested with the same versions, in an earlier report. Otherwise `entry`."""

    def described(other: RobustnessEntry) -> RobustnessEntry:
        # The number of threads changes no figure, nor does torch's build, which follows a "+" in its version.
        versions = {name: number and number.partition("+")[0] for name, number in other.versions.items()}
        return replace(other, results=[], threads=1, versions=versions)

    return next((other for other in earlier if described(other) == described(entry)), entry)


def measure(
    networks: Mapping[Path, nn.Module],
    split: Split,
    path: Path,
    *,
    examples: int = 1000,
    overwrite: bool = False,
    quiet: bool = False,
) -> RobustnessReport:
    """Test all networks, write the report to `path` after each test, and return it.

    networks: path of the checkpoint -> network, the baseline of an architecture before its others.
    split: on the networks' device. `tests` says how many of its images each attack gets.
    Results in the report at `path` are kept if they are of the same checkpoints, attacks and versions.
    Raises UserError if other results in that report would be lost; `overwrite` drops them. Raises UserError as well if
    a checkpoint is replaced meanwhile, and stores nothing of the test during which it happened.
    """
    earlier = read_robustness(path).entries if path.exists() else []
    plan = tests(len(split), examples)
    results = Results(networks, plan, earlier)
    before = sum(len(entry.results) for entry in earlier)
    lost = before - sum(len(entry.results) for entry in results.report(split).entries)
    if lost and not overwrite:
        raise UserError(
            f"{path} holds {lost} figures of other checkpoints, versions or numbers of images, which would be lost: "
            f"{overwrite_advice(path, 'replaces them')}--results names another folder"
        )
    notes = notes_beside(path)
    for entry, done, (tested, network) in zip(results.entries, results.done, networks.items(), strict=True):
        baseline = networks[results.baselines[entry.architecture]]
        for index, test in enumerate(plan):
            if not done[index]:
                if not quiet:
                    what = f"{test.attack}, {test.setting}" + (f", from image {test.first + 1:,}" if test.first else "")
                    print(f"{entry.name}, test {index + 1} of {len(plan)}: {what}", flush=True)
                rows = test.run(network, baseline, split, notes, progress=not quiet)
                check_unchanged(tested, entry.sha256)
                check_unchanged(results.baselines[entry.architecture], entry.source_sha256)
                done[index] = rows
                write_document(path, results.report(split))
                notes.finish()
    write_document(path, results.report(split))
    return read_robustness(path)


class Logs(NamedTuple):
    """The logs of defended trainings that the report on robustness shows."""

    defenses: list[Log]  # of four defences on the same network
    candidates: list[Log]  # of changes to a training on equal time; the first one is without a change
    attacked: list[tuple[Log, AttackRow]]  # those whose network was tested with the strong attack on validation images
    overfitting: list[Log]  # of catastrophic overfitting
    tried: list[Log]  # of settings that were tried
    shipped: list[Log]  # of the shipped robust networks


def training_logs(models: Path, results: Path) -> Logs:
    """The logs in results/defenses, candidates, overfitting and tried, and of the shipped robust networks.

    results/validation/NAME.json is a report of `test-*.py --split validation --attack strong`, at 8/255, on the network
    whose log is NAME.jsonl. Logs of trainings without a defence, or with one that has no radius, are left out.
    Raises TrainingError if a file is not a training log, or if the validation images were not attacked after an epoch.
    Raises UserError if a report is of another kind or about the checkpoint of another report, if its log is missing, or
    if the candidates lack start.jsonl.
    """

    def logs(paths: Iterable[Path], *keys: str) -> list[Log]:
        defended = [path for path in paths if read_log(path).arguments.defense_epsilon is not None]
        return [read_log(path, "robust_accuracy", "choosing_accuracy", *keys) for path in defended]

    seen: set[str] = set()  # the digests of the attacked checkpoints

    def attacked(path: Path) -> tuple[Log, AttackRow]:
        report = read_document(path, TestReport, "a report")
        wanted = ("strong", "white_box", "linf", RADIUS)
        rows = [row for row in report.attacks if (row.name, row.setting, row.norm, row.epsilon) == wanted]
        stems = [folder / path.stem for folder in (models, results / "candidates", results / "tried")]
        files = [log for stem in stems if (log := beside(stem, ".jsonl")).exists()]
        networks = [network for stem in stems if (network := beside(stem, ".safetensors")).exists()]
        found = logs(files)
        trained = {(log.arguments.network, log.arguments.dataset) for log in found[:1]}
        faults = {
            "is not about validation images": report.split != "validation",
            f"lacks the strong, white-box attack at {epsilon_text(RADIUS)}": not rows,
            f"lacks the log of a defence: copy it to {results / 'tried' / path.stem}.jsonl": not found,
            "is about another network or data set": trained != {(report.network, report.dataset)},
            "is about another checkpoint": any(file_digest(network) != report.sha256 for network in networks),
            "is about the checkpoint of another report": report.sha256 in seen,
        }
        if fault := next((text for text, present in faults.items() if present), None):
            raise UserError(f"{path} {fault}")
        if report.sha256:
            seen.add(report.sha256)
        return found[0], rows[0]

    def settings(log: Log) -> tuple[Any, ...]:
        return log.arguments.defense_name, log.arguments.defense_epsilon, log.arguments.width

    tried = {path for kind in ("n-fgsm", "robust") for path in (results / "tried").glob(f"*-{kind}-*.jsonl")}
    candidates = sorted((results / "candidates").glob("*.jsonl"), key=lambda path: (path.stem != "start", path))
    if candidates and (candidates[0].stem != "start" or not logs(candidates[:1])):
        raise UserError(f"{candidates[0].parent} lacks start.jsonl, the log of the defence that the others change")
    robust = [beside(path, ".jsonl") for _, path in checkpoint_paths(models) if path.stem.endswith("-robust")]
    return Logs(
        defenses=logs(sorted((results / "defenses").glob("*.jsonl"))),
        candidates=logs(candidates),
        attacked=[attacked(path) for path in sorted((results / "validation").glob("*.json"))],
        overfitting=sorted(logs((results / "overfitting").glob("*.jsonl"), "single_step_accuracy"), key=settings),
        tried=logs(sorted(tried)),
        shipped=logs(path for path in robust if path.exists()),
    )
