"""Broken defences and honest networks, at full size: is a broken one trusted, is an honest one accused?

    make zoo

diagnoses every broken defence of tests.helpers.defences around the shipped CNN, every shipped network on two slices of
the test images, and three networks of width 16 on twenty slices. It prints a line for each, writes results/zoo.json and
its table in docs/robustness.md, and ends with status 1 if a broken defence was trusted or an honest network accused.
The networks of width 16 are trained first and kept in runs/zoo/.
"""

import argparse
import contextlib
import copy
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta
from msgspec.structs import replace
from torch import nn

from attacks import AttackError, pgd
from attacks.core import Model, evaluating, logits_of
from defenses.losses import NFGSM
from tests.helpers.defences import BROKEN, Broken
from tests.helpers.project import ROOT
from utils.checkpoints import load_checkpoint
from utils.constants import RADIUS
from utils.data import Split, load_split
from utils.diagnosis import Diagnosis, diagnose
from utils.diagnosis.judging import Subject
from utils.files import write_atomically
from utils.formats import Count, Document, Fraction, Name, Positive, Record, TotalSeconds, read_document, write_document
from utils.recipes import RECIPES
from utils.tables import markdown, percent
from utils.training import train

PAGE, OUTPUT, TRAINED = Path("docs") / "robustness.md", Path("results") / "zoo.json", Path("runs") / "zoo"
BEFORE_THE_TABLE, AFTER_THE_TABLE = "<!-- the zoo -->\n", "<!-- end of the zoo -->"  # in PAGE
VERDICTS = ("trustworthy", "not trustworthy", "cannot say")

SLICE, SLICES = 500, 20  # images, and slices of the test images for the networks of width 16
CAGED = 50  # images for a broken defence


class Row(Record, frozen=True, kw_only=True):
    """One diagnosis of one inhabitant."""

    name: Name
    family: Name  # of a broken defence; "honest" or "label leaking" for a network alone
    honest: bool
    first: Count  # the position of its first test image
    images: Positive
    clean_accuracy: Fraction
    quoted: Fraction  # what PGD-20 leaves, as a paper would quote it
    adapted: Fraction | None = None  # what an attack on the network inside leaves
    at_most: Fraction  # what the diagnosis has not broken
    verdict: Annotated[str, Meta(max_length=2000)]
    failed: list[Name]
    seconds: TotalSeconds


class ZooReport(Document, frozen=True, kw_only=True):
    """What `make zoo` writes."""

    rows: list[Row]


@dataclass(frozen=True)
class Cage:
    """Whom to diagnose, on which test images. name: of a broken defence, a shipped network or one of TRAININGS."""

    name: str
    family: str
    first: int
    images: int


def network_trained(name: str, data_dir: str | None = None, device: str = "cpu") -> nn.Module:
    """A network of width 16, trained or read from an earlier training. name: a key of TRAININGS."""
    path = ROOT / TRAINED / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        defense, epochs = TRAININGS[name]
        recipe = replace(RECIPES["one-cycle"], epochs=epochs, shift=1)
        recipe = recipe.with_defense() if defense else recipe
        splits = [load_split("cifar10", split, data_dir) for split in ("train", "validation")]
        train("cnn", *splits, recipe, output=path, defense=defense, width=16, device=device, quiet=True)
    return load_checkpoint(path).to(device)


TRAININGS: dict[str, tuple[NFGSM | None, int]] = {
    "plain, width 16": (None, 4),
    "robust, width 16": (NFGSM(RADIUS), 5),
    "early, width 16": (NFGSM(RADIUS), 1),
}


def cages(full: bool = False) -> list[Cage]:
    """All diagnoses, those that take longest first. full: with whole slices of the shipped networks too."""
    shipped = sorted(path.stem for path in (ROOT / "models").glob("*.safetensors"))
    alone = [name for name in shipped if name.endswith("robust")] + [n for n in shipped if not n.endswith("robust")]
    found = [
        Cage(
            name,
            "label leaking" if "augment-0.2" in name else "honest",
            first,
            SLICE if full else CAGED if name.endswith(("robust", "wide")) else SLICE // 2,
        )
        for name in alone
        for first in (0, 5000)
    ]
    found += [Cage(name, "honest", first * SLICE, SLICE) for name in TRAININGS for first in range(SLICES)]
    return found + [Cage(broken.name, broken.family, 0, CAGED) for broken in BROKEN]


def built(broken: Broken, network: nn.Module, device: torch.device) -> Model:
    """The defence around a network, all of it on the device: a defence may hold tensors of its own."""
    model = broken.build(network.to(device))
    return model.to(device) if isinstance(model, nn.Module) else model


def adapted_accuracy(broken: Broken, network: nn.Module, split: Split, epsilon: float) -> float:
    """What is left of a defence by an attack on the network inside it, judged by copies that nobody has asked.

    The attack is PGD on the margin that runs to the end, with three starts; an image is broken if one of its three
    examples is. A defence that answers at random is judged by most of five passes.
    """
    images, labels = split.take(torch.arange(len(split)))
    judge = Subject(built(broken, copy.deepcopy(network), split.device), split, batch_size=len(split))
    judge.random = broken.family == "randomness"
    left = judge.right(images, labels)
    for seed in range(3):
        if not left.any():
            break
        options: dict = {"steps": 50, "loss": "margin", "early_stop": False, "seed": seed}
        left &= judge.right(pgd(network, images, labels, epsilon=epsilon, **options), labels)
    return float(left.float().mean())


def quoted_accuracy(model: Model, split: Split, epsilon: float) -> float:
    """What a careless evaluation says: PGD-20 on the model, and the model itself judges, in the state it is then in."""
    images, labels = split.take(torch.arange(len(split)))
    with torch.no_grad(), warnings.catch_warnings(), evaluating(model, split.device):
        warnings.simplefilter("ignore", RuntimeWarning)
        with contextlib.suppress(AttackError):
            images = pgd(model, images, labels, epsilon=epsilon)
        return float((logits_of(model, images).argmax(1) == labels).float().mean())


def diagnosed(model: Model, split: Split, epsilon: float, **options: object) -> tuple[Diagnosis, float]:
    """The diagnosis and the seconds that it took."""
    start = time.perf_counter()
    diagnosis = diagnose(model, split, epsilon=epsilon, **options)  # type: ignore[arg-type]
    return diagnosis, time.perf_counter() - start


def inhabitant(cage: Cage, data_dir: str | None = None, device: str = "cpu") -> Row:
    """Diagnose one inhabitant of the zoo."""
    torch.set_num_threads(1)
    test = _test_images(data_dir, device)
    split = test.between(cage.first, cage.first + cage.images)
    broken = next((entry for entry in BROKEN if entry.name == cage.name), None)
    adapted = None
    if broken:
        inside = load_checkpoint(ROOT / "models" / "cnn.safetensors").to(test.device)
        adapted = adapted_accuracy(broken, inside, split, RADIUS)
        quoted = quoted_accuracy(built(broken, copy.deepcopy(inside), test.device), split, RADIUS)
        model = built(broken, inside, test.device)
    elif cage.name in TRAININGS:
        model = network_trained(cage.name, data_dir, device)
    else:
        model = load_checkpoint(ROOT / "models" / f"{cage.name}.safetensors").to(test.device)
    # A defence is diagnosed as a stranger's would be, through a surrogate that learns from other test images.
    options: dict = {"whole": test.between(SLICE, 6 * SLICE)}
    if not broken:
        options = {"source": load_checkpoint(ROOT / "models" / _source(cage.name)).to(test.device)}
        options |= {"whole": test} if cage.family == "label leaking" else {}
    diagnosis, seconds = diagnosed(model, split, RADIUS, **options)
    if not broken:
        quoted = float(diagnosis.evidence.standard.left.float().mean())  # type: ignore[union-attr]
    return row(cage, diagnosis, quoted, adapted, seconds)


def row(cage: Cage, diagnosis: Diagnosis, quoted: float, adapted: float | None, seconds: float) -> Row:
    """What the report says of one diagnosis."""
    found = diagnosis.evidence
    return Row(
        name=cage.name,
        family=cage.family,
        honest=cage.family == "honest",
        first=cage.first,
        images=cage.images,
        clean_accuracy=float(found.clean.float().mean()),
        quoted=quoted,
        adapted=adapted,
        at_most=diagnosis.strongest.accuracy,
        verdict=diagnosis.verdict[:2000],
        failed=diagnosis.failed,
        seconds=round(seconds, 1),
    )


def _source(name: str) -> str:
    """The shipped network that crafts transferred examples: the baseline of the same kind, or the other one."""
    same_kind = "cnn-lstm" if name.startswith("cnn-lstm") else "cnn"
    return f"{same_kind if name != same_kind else {'cnn': 'cnn-lstm', 'cnn-lstm': 'cnn'}[name]}.safetensors"


@lru_cache(1)
def _test_images(data_dir: str | None, device: str) -> Split:
    return load_split("cifar10", "test", data_dir).to(device)


def wrong(rows: list[Row]) -> list[str]:
    """Who was trusted although broken, or accused although honest."""
    trusted = [f"{row.name} was trusted" for row in rows if not row.honest and row.verdict.startswith("trustworthy")]
    return trusted + [
        f"{row.name} was not trusted from image {row.first} on: {row.verdict}"
        for row in rows
        if row.honest and not row.verdict.startswith("trustworthy")
    ]


def zoo_table(report: ZooReport) -> str:
    """A row for each broken defence, and one for all slices of each network."""
    rows = []
    for name, of_name in groupby(sorted(report.rows, key=_order(report)), key=lambda row: row.name):
        group = list(of_name)
        verdicts = {v: sum(row.verdict.startswith(v) for row in group) for v in VERDICTS}
        said = [v if len(group) == 1 else f"{v} ({count} of {len(group)})" for v, count in verdicts.items() if count]
        images = sum(row.images for row in group)

        def mean(values: list[float], group: list[Row] = group, images: int = images) -> str:
            return percent(sum(value * row.images for value, row in zip(values, group, strict=True)) / images)

        adapted = [row.adapted for row in group if row.adapted is not None]
        figures = [mean([row.clean_accuracy for row in group]), mean([row.quoted for row in group])]
        figures += [mean(adapted) if adapted else "", mean([row.at_most for row in group])]
        rows.append([group[0].family, name, f"{images:,}", *figures, ", ".join(said)])
    header = ["family", "network or defence", "images", "clean", "PGD-20", "adapted attack", "diagnosis", "verdict"]
    return markdown(header, rows)


def _order(report: ZooReport) -> Callable[[Row], tuple]:
    """Broken defences as BROKEN lists them, then networks in the order of the report."""
    places = {broken.name: place for place, broken in enumerate(BROKEN)}
    names = list(dict.fromkeys(row.name for row in report.rows))
    return lambda row: (places.get(row.name, len(places) + names.index(row.name)), row.first)


def results(chosen: list[Cage], data_dir: str | None, processes: int, device: str = "cpu") -> Iterator[Row]:
    """The rows of the chosen cages, as they become ready."""
    # New processes, because a copy of this one could not use the GPU that it has used.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(inhabitant, cage, data_dir, device) for cage in chosen]):
            yield future.result()


def main() -> None:
    """Diagnose the whole zoo, or the part of it that has not been diagnosed."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--only", default="", help="only families and names with this text; --resume does the rest")
    text = f"{SLICE} images of each shipped network: hours on two cores, some minutes on a GPU"
    parser.add_argument("--full", action="store_true", help=text)
    parser.add_argument("--processes", type=int, default=2, help="at once (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the networks compute (default %(default)s)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    data_dir, partial = os.environ.get("DATA_DIR"), ROOT / TRAINED / "zoo.partial.json"
    rows: list[Row] = []
    if args.resume and partial.exists():
        rows = list(read_document(partial, ZooReport, "a report of the zoo").rows)
    done = {(row.name, row.first) for row in rows}
    missing = [cage for cage in cages(args.full) if (cage.name, cage.first) not in done]
    chosen = [cage for cage in missing if args.only in f"{cage.family}: {cage.name}"]
    start = time.monotonic()
    partial.parent.mkdir(parents=True, exist_ok=True)
    for name in TRAININGS.keys() & {cage.name for cage in chosen}:
        network_trained(name, data_dir, args.device)
    for new in results(chosen, data_dir, args.processes, args.device):
        rows.append(new)
        print(f"{new.name:32} {new.seconds:6.0f} s  quoted {new.quoted:5.1%}, left {new.at_most:5.1%}  {new.verdict}")
        sys.stdout.flush()
        write_document(partial, ZooReport(rows=rows))
    if len(chosen) == len(missing):
        write_document(ROOT / OUTPUT, ZooReport(rows=sorted(rows, key=lambda row: (row.honest, row.name, row.first))))
        write_table(read_document(ROOT / OUTPUT, ZooReport, "a report of the zoo"))
        partial.unlink(missing_ok=True)
    print(f"{len(rows)} diagnoses in {(time.monotonic() - start) / 60:.0f} minutes", *wrong(rows), sep="\n")
    sys.exit(bool(wrong(rows)))


def write_table(report: ZooReport) -> None:
    """Replace the zoo's table in PAGE."""
    before, _, rest = (ROOT / PAGE).read_text(encoding="utf-8").partition(BEFORE_THE_TABLE)
    after = rest.partition(AFTER_THE_TABLE)[2]
    text = f"{before}{BEFORE_THE_TABLE}\n{zoo_table(report)}\n\n{AFTER_THE_TABLE}{after}"
    write_atomically(ROOT / PAGE, text.encode())


if __name__ == "__main__":
    main()
