"""The command line of test-*.py: one network on clean images and under attack, printed and written as a report."""

from __future__ import annotations

import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from msgspec import Meta

from utils.commands import checkpoints, types
from utils.commands.parser import Parser, check_writable, pick_device, run
from utils.constants import DATASETS, EPSILONS, EVALUATION_BATCH, L2_RADIUS, LOSSES, RADIUS, SPLITS, UserError
from utils.formats import (
    AttackRow,
    DiagnosisReport,
    MinimalEpsilons,
    Precision,
    TestReport,
    read_document,
)
from utils.quoting import shown
from utils.tables import epsilon_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from utils.data import Split
    from utils.evaluation import Result
    from utils.notes import Notes

ATTACKS = ("fgsm", "pgd", "strong", "autoattack")  # the keys of utils.evaluation.ATTACKS
PGD_OPTIONS = ("steps", "step_size", "restarts", "loss", "momentum")


def test_script(network: str) -> None:
    """Test a checkpoint as the command line says: the body of test-*.py. network: a key of networks.NETWORKS."""
    parser = test_parser(network)
    args = parser.parse_args()
    check_attack_flags(parser, args)
    run(parser, lambda: test_command(network, args), output=first_output(args), batch_size=args.batch_size)


def first_output(args: Namespace) -> Path | None:
    """The file that no other run may write meanwhile, and beside which finished batches are noted; None without one."""
    return args.json or (args.figures and args.figures / "accuracy.png")


def check_attack_flags(parser: Parser, args: Namespace) -> None:
    """End the process with an error if flags do not fit each other; gather the options of PGD in `args.pgd`."""
    radius = types.radius if args.norm == "l2" else types.epsilon
    for name in ("epsilon", "step_size"):
        given = getattr(args, name)
        try:
            setattr(args, name, list(map(radius, given)) if isinstance(given, list) else given and radius(given))
        except ArgumentTypeError as error:
            parser.error(f"argument --{name.replace('_', '-')}: {error}")
    args.pgd = {name: getattr(args, name) for name in PGD_OPTIONS if getattr(args, name) is not None}
    if args.pgd and "pgd" not in args.attack and not args.minimal_epsilon:
        parser.error(f"--{next(iter(args.pgd)).replace('_', '-')} belongs to --attack pgd")
    alone = set(args.attack) - {"fgsm", "pgd"}  # which take neither targets nor expectation over transformation
    if args.eot > 1 and alone == set(args.attack):
        parser.error("--eot belongs to --attack fgsm and pgd")
    if args.precision != "float32" and not {"pgd", "strong"} & set(args.attack):
        parser.error("--precision belongs to --attack pgd and strong")
    if args.target and alone:
        parser.error("--target belongs to --attack fgsm and pgd")
    if args.minimal_epsilon and (args.source or args.target):
        parser.error("--minimal-epsilon goes without --source and --target")
    if args.norm == "l2" and args.diagnose:
        parser.error("--diagnose checks L-infinity figures, not those of --norm l2")
    args.default_radius = L2_RADIUS if args.norm == "l2" else RADIUS
    smallest = min(filter(None, args.epsilon or [args.default_radius]), default=1)
    if args.step_size and args.step_size > 2 * smallest:
        parser.error(f"--step-size {args.step_size:g} is more than twice --epsilon {smallest:g}: it leaves the ball")


def test_parser(network: str) -> Parser:
    """The parser of test-*.py."""
    parser = Parser(
        f"test-{network}.py",
        f"Test a {network} checkpoint on clean images and under attack, with 95 % Wilson intervals.",
        [
            "--epsilon 8/255 --json out.json",
            f"--checkpoint models/{network}-robust.safetensors --attack pgd --examples 100",
        ],
    )
    add = partial(parser.add, "data")
    add("--dataset", DATASETS, "the data set to test on: cifar10 or digits (default: that of the training)")
    parser.add(
        "network", "--checkpoint", types.file_path, f"the one to test ({checkpoints.default_baselines(network)})"
    )
    add_test_flags(parser)
    return parser


def add_test_flags(parser: Parser) -> None:
    """Add the flags that choose the images, the attacks with their options, and what is written."""
    add = partial(parser.add, "data")
    add("--split", SPLITS, "train, validation or test (default) images", default="test")
    add("--examples", types.positive_int, "test only on the first N images (default all)")
    add("--batch-size", types.positive_int, f"images in a batch (default {EVALUATION_BATCH})", default=EVALUATION_BATCH)
    parser.add("output", "--json", types.file_path, "write the report to this file")
    parser.add_switch("--per-image", "list in the report which images each attack leaves correct")
    parser.add("output", "--figures", types.file_path, "draw the figures into this folder")
    add = partial(parser.add, "attack")
    add("--attack", ATTACKS, f"{', '.join(ATTACKS)} (default fgsm)", nargs="+", default=["fgsm"])
    text = "radii in pixel units, such as 0.02 or 8/255 (default for fgsm 0.02 to 0.1, else 8/255; l2: 0.5)"
    add("--epsilon", types.as_written, text, nargs="+")
    add("--norm", ("linf", "l2"), "of the radii: linf (default), l2", default="linf")
    text = "a class that each image is to become, or least-likely or random; for fgsm and pgd (default any wrong class)"
    add("--target", str, text)
    add("--steps", types.positive_int, "steps of pgd (default 20)")
    add("--step-size", types.as_written, "of pgd, in pixel units (default 2.5 epsilon / steps)")
    add("--restarts", types.positive_int, "random starts of pgd (default 1)")
    number = types.number(Annotated[float, Meta(ge=0, le=2)])
    add("--momentum", number, "of pgd's gradients; 1 transfers better (default 0)")
    add("--loss", LOSSES, "of pgd: cross_entropy (default) or margin")
    text = "passes of a random network for each gradient (default 1)"
    add("--eot", types.positive_int, text, default=1)
    text = "of gradients of pgd and strong: float32 (default), bfloat16"
    add("--precision", get_args(Precision), text, default="float32")
    text = "craft the examples on this network and transfer them; pgd then takes all its steps (default: white-box)"
    add("--source", types.file_path, text)
    add("--seed", types.seed, "of the attacks' random numbers (default 0)", default=0)
    switch = partial(parser.groups["attack"].add_argument, action="store_true")
    switch("--minimal-epsilon", help="also find the smallest radius at which each image falls to pgd")
    text = "then check whether the figures can be trusted, at the first epsilon; --source or a baseline transfers"
    switch("--diagnose", help=text)


@dataclass
class Prepared:
    """Everything that the attacks need, loaded and checked."""

    sha256: str | None  # of the checkpoint
    split: Split
    network: nn.Module
    source: nn.Module | None  # crafts the examples; None: the network itself
    diagnosis_path: Path | None  # of the checkpoint that crafts what --diagnose transfers
    diagnosis_source: nn.Module | None
    notes: Notes | None  # finished batches, if a report or figures are to be written
    save: Path | None = None  # the folder for adversarial examples
    whole: Split | None = None  # `split` may be a part of it; a surrogate learns from the rest


def test_command(network_name: str, args: Namespace) -> None:
    """Load, attack, print, and write the report and the figures."""
    from networks.cost import multiply_adds
    from utils.distributed import from_main, process_group

    newest = None if args.checkpoint else checkpoints.newest_training(network_name)
    args.checkpoint = args.checkpoint or checkpoints.default_baseline(network_name, args.dataset or "cifar10")
    with process_group():
        device = pick_device(args.device)
        subject = from_main(lambda: prepare_test(network_name, args))
        move(subject, device)
        network: Any = subject.network
        parameters = sum(parameter.numel() for parameter in network.parameters())
        cost = f"{parameters:,} parameters, {multiply_adds(network):,} multiply-adds an image"
        print(f"{args.checkpoint}: {network_name}, width {network.arguments['width']}, {cost}")
        print(f"{subject.split.dataset} {subject.split.name} split, {len(subject.split):,} images, {device}")
        if newest not in (None, args.checkpoint):
            print(
                f"to test your newest training: python test-{network_name}.py --checkpoint {shlex.quote(str(newest))}"
            )
        with keeping(subject):
            report = attack_and_report(subject, args, {"checkpoint": str(args.checkpoint), "network": network_name})
            from_main(lambda: write_report(report, subject, args))


@contextmanager
def keeping(subject: Prepared) -> Iterator[None]:
    """A context in which Ctrl-C says whether finished batches are kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = subject.notes and subject.notes.rows
        hint = "the finished batches are kept, and the same command continues after them" if kept else ""
        raise KeyboardInterrupt(hint) from None


def move(subject: Prepared, device: torch.device) -> None:
    """Move images and networks to a device, and prepare this process for long attacks."""
    from utils.allocator import keep_freed_memory

    subject.split = subject.split.to(device)
    subject.whole = subject.whole and subject.whole.to(device)
    for each in filter(None, (subject.network, subject.source, subject.diagnosis_source)):
        each.to(device)
    keep_freed_memory()


def attack_and_report(subject: Prepared, args: Namespace, about: dict[str, Any]) -> TestReport:
    """Attack and print. about: what the report says of the network."""
    import torch

    from utils.evaluation import hits

    check_report_fits(len(subject.split), args)
    torch.manual_seed(args.seed)
    clean, rows = attack_table(subject, args)
    minimal = minimal_epsilons(subject, args) if args.minimal_epsilon else None
    diagnosis = print_diagnosis(subject, args) if args.diagnose else None
    split = subject.split
    about |= {"sha256": subject.sha256, "dataset": split.dataset, "split": split.name, "examples": len(split)}
    about |= {"clean_accuracy": clean.accuracy, "clean_confidence_interval": clean.confidence_interval}
    about |= {"clean_hits": hits(clean) if args.per_image else None, "minimal_epsilon": minimal}
    return TestReport(**about, attacks=rows, diagnosis=diagnosis)


def prepare_test(network_name: str, args: Namespace) -> Prepared:
    """Load everything onto the CPU. Raises UserError for whatever is missing or damaged, before hours of attacks."""
    from utils.checkpoints import file_digest, read_metadata
    from utils.data import load_split
    from utils.notes import notes_beside

    check_outputs(args)
    checkpoints.check_is_made(args.checkpoint, network_name)
    sha256 = file_digest(args.checkpoint)  # before the network is loaded; `write_report` compares it afterwards
    trained_on = read_metadata(args.checkpoint).dataset
    dataset = args.dataset or trained_on
    if trained_on != dataset or dataset not in DATASETS:  # before CIFAR-10 is downloaded, perhaps for nothing
        wanted = args.dataset or " or ".join(DATASETS)
        raise UserError(f"{args.checkpoint} was trained on {shown(trained_on)}, not on {wanted}")
    whole = load_split(dataset, args.split, args.data_dir)
    split = whole.first(args.examples)
    network = checkpoints.load_network(args.checkpoint, split, network_name)
    source = checkpoints.load_network(args.source, split) if args.source else None
    diagnosis_path, diagnosis_source = args.source, source
    if args.diagnose and not source:
        diagnosis_path = checkpoints.find_baseline(split, network_name, args.checkpoint)
        diagnosis_source = checkpoints.load_network(diagnosis_path, split) if diagnosis_path else None
    output = first_output(args)
    notes = notes_beside(output) if output else None
    return Prepared(sha256, split, network, source, diagnosis_path, diagnosis_source, notes, whole=whole)


def check_outputs(args: Namespace) -> None:
    """Raise UserError if a file cannot be written, or if a package for the attacks is missing."""
    for path in filter(None, (args.json, args.figures and args.figures / "accuracy.png")):
        check_writable(path)
    if args.json and args.json.exists() and args.json.stat().st_size:
        try:
            read_document(args.json, TestReport, "a test report")
        except UserError:
            raise UserError(f"--json {args.json} is not a test report, and a report would replace it") from None
    if ("autoattack" in args.attack or args.diagnose) and not find_spec("pyautoattack"):
        raise UserError("AutoAttack and --diagnose need the package pyautoattack: pip install pyautoattack")


def check_report_fits(examples: int, args: Namespace) -> None:
    """Raise UserError, before hours of attacks, if the report would be longer than one that is read."""
    masks = 1 + len(args.attack) * len(args.epsilon or EPSILONS[1:])
    of_an_image = masks * args.per_image + 20 * args.minimal_epsilon  # bytes, with the indent
    if args.json and examples * of_an_image > TestReport.longest - 2**16:
        flag = "--per-image" if args.per_image else "--minimal-epsilon"
        raise UserError(f"a report on each of {examples:,} images is too long: leave out {flag}, or use --examples")


def attack_table(subject: Prepared, args: Namespace) -> tuple[Result, list[AttackRow]]:
    """Run the attacks and print a line for each. Returns the result on clean images, and a row for each attack."""
    from utils.evaluation import evaluate, report_row

    setting = "white_box" if subject.source is None else "transfer"
    common = {"source": subject.source, "batch_size": args.batch_size, "progress": True}
    usual = args.norm == "linf" and args.target is None
    radii = {
        attack: args.epsilon or (EPSILONS[1:] if attack == "fgsm" and usual else [args.default_radius])
        for attack in args.attack
    }
    norm = {} if args.norm == "linf" else {"norm": args.norm}
    usual_options = {**norm, "seed": args.seed}
    reduced = {} if args.precision == "float32" else {"precision": args.precision}
    options = {"autoattack": usual_options, "strong": usual_options | reduced}
    options["pgd"] = {**args.pgd, "eot": args.eot} | options["strong"]
    options["fgsm"] = norm | ({"eot": args.eot} if args.eot > 1 else {})
    print(
        f"\n{'attack':12}{'setting':11}{'epsilon':>8}{'accuracy':>10}{'95 % interval':>17}{'success':>10}{'seconds':>9}"
    )
    # All radii share the sign of the gradient, but no image is kept.
    at_once = radii.pop("fgsm", []) if usual and not subject.save else []
    clean, *attacked = fgsm_results(subject, args, at_once, common)
    print_row("clean", "", clean)
    for result in attacked:
        print_row(result.attack, setting, result, clean)
    common["target"] = args.target and target_class(args.target, subject.split)
    common["notes"] = None if subject.save else subject.notes  # of a finished batch, the examples are not kept
    for attack, of_attack in radii.items():
        for radius in of_attack:
            crafted: list[Tensor] = []
            common |= {"options": options[attack], "on_batch": crafted.append if subject.save else None}
            result = evaluate(subject.network, subject.split, attack, radius, **common)
            print_row(attack, setting, result, clean)
            attacked.append(result)
            if subject.save:
                save_examples(subject, result, crafted, args.batch_size)
    source = str(args.source) if args.source else None
    rows = [report_row(result, setting, source, clean=clean, per_image=args.per_image) for result in attacked]
    return clean, rows


def fgsm_results(subject: Prepared, args: Namespace, radii: Sequence[float], common: dict[str, Any]) -> list[Result]:
    """What `evaluate_fgsm` returns. If the notes have all of it, it comes from there; else it is noted."""
    import torch

    from utils.distributed import from_main
    from utils.evaluation import Result, evaluate_fgsm, evaluation_key, hits

    options, notes, split = ({"eot": args.eot} if args.eot > 1 else {}), subject.notes, subject.split
    if notes is None:
        return evaluate_fgsm(subject.network, split, radii, eot=args.eot, **common)
    elsewhere = subject.source not in (None, subject.network)
    about = {**options, "in one pass": True}  # `evaluate` notes FGSM batch by batch, so under another key
    every = [0.0, *radii]
    keys = [
        evaluation_key(subject.network, split, "fgsm", radius, about, subject.source, args.batch_size)
        for radius in every
    ]
    kept = from_main(lambda: [notes.kept(key, [len(split)]) for key in keys])
    if all(kept):
        rows = [(radius, [hit == "1" for hit in row[0][0]], row[0][1]) for radius, row in zip(every, kept, strict=True)]
        same: dict[str, Any] = {"options": options, "transferred": elsewhere}
        return [
            Result(radius, sum(mask), len(split), seconds, mask=torch.tensor(mask), **same)
            for radius, mask, seconds in rows
        ]
    found = evaluate_fgsm(subject.network, split, radii, eot=args.eot, **common)
    if not any(result.unusual for result in found):  # a doubtful network is examined, and its user warned, each time
        from_main(lambda: notes.add_each({key: (hits(r), r.seconds) for key, r in zip(keys, found, strict=True)}))
    return found


def target_class(text: str, split: Split) -> int | str:
    """What --target means: a class by its name or number, or one of the words for a target of each image."""
    if text in ("least-likely", "random"):
        return text
    if text in split.class_names:
        return split.class_names.index(text)
    if text.isdecimal() and int(text) < len(split.class_names):
        return int(text)
    raise UserError(f"--target {shown(text)} is not a class of {split.dataset}, least-likely or random")


def minimal_epsilons(subject: Prepared, args: Namespace) -> MinimalEpsilons:
    """Search the smallest radius at which each image falls, and print the median."""
    import torch

    from attacks import minimal_epsilon
    from attacks.pgd import DEFAULT_STEPS
    from utils.data import batches
    from utils.distributed import rank
    from utils.models import explaining
    from utils.progress import moving, progress_bar

    options = {**args.pgd, "eot": args.eot, "seed": args.seed, "norm": args.norm}
    bar = progress_bar(title="minimal epsilon", total=len(subject.split), unit="image", visible=rank() == 0)
    found = []
    with bar, explaining(subject.split, subject.network):
        for images, labels in batches(subject.split, args.batch_size):
            with moving(bar, len(labels)):
                found.append(minimal_epsilon(subject.network, images, labels, **options).cpu())
    epsilons = torch.cat(found)
    median = float(epsilons.median())  # the smallest radius at which at least half of the images have fallen
    each = [float(f"{epsilon:.6g}") if isfinite(epsilon) else None for epsilon in epsilons.tolist()]
    text = f"at most {median:.4g}" if isfinite(median) else "not found"
    print(f"\nsmallest radius at which half of the images fall: {text}; for {each.count(None):,} no example was found")
    return MinimalEpsilons(
        norm=args.norm,
        steps=args.pgd.get("steps", DEFAULT_STEPS),
        examples=len(each),
        median=median if isfinite(median) else None,
        epsilons=each,
    )


def folder_of(attack: str, epsilon: float) -> str:
    """The folder for the adversarial examples of an attack at one radius, in that of --save."""
    return f"{attack}-{epsilon:.4g}"


def save_examples(subject: Prepared, result: Result, crafted: list[Tensor], batch_size: int) -> None:
    """Save the adversarial examples of a result into a folder of their own, and print how many survive rounding."""
    from attacks.pgd import DEFAULT_STEPS
    from utils.saving import save_images

    assert subject.save is not None
    folder = subject.save / folder_of(result.attack, result.epsilon)
    allowed = {"fgsm": 1, "pgd": result.options.get("steps", DEFAULT_STEPS) * result.options.get("restarts", 1)}
    about: dict[str, Any] = {"attack": result.attack, "epsilon": result.epsilon, "batch_size": batch_size}
    about |= {"iterations": allowed.get(result.attack), "norm": result.options.get("norm", "linf")}
    saved = save_images(folder, subject.network, subject.split, crafted, **about).header
    print(
        f"  {folder}: {saved.survived} of {saved.misclassified} misclassified examples stay so after rounding to 8 "
        f"bits; accuracy on the saved files {saved.accuracy:.2%}"
    )


def print_row(name: str, setting: str, result: Result, clean: Result | None = None) -> None:
    """Print a line of the table of attacks. clean: the result without an attack, for the attack's success rate."""
    from utils.evaluation import success_rate

    interval = "{:.2%} - {:.2%}".format(*result.confidence_interval)
    success = None if clean is None else success_rate(result, clean)
    figures = f"{epsilon_text(result.epsilon):>8}{result.accuracy:10.2%}{interval:>17}"
    figures += f"{'' if success is None else f'{success:.2%}':>10}{result.seconds:9.1f}"
    print(f"{name:12}{setting:11}{figures}", flush=True)


def print_diagnosis(subject: Prepared, args: Namespace) -> DiagnosisReport:
    """Run and print the checks of utils.diagnosis."""
    from utils.diagnosis import diagnose

    radius = next(filter(None, args.epsilon or ()), RADIUS)
    path = subject.diagnosis_path
    print(f"\ncan these figures be trusted? Checks at epsilon {epsilon_text(radius)}, source {path or 'none'}:\n")
    options: dict[str, Any] = {"seed": args.seed, "batch_size": args.batch_size, "notes": subject.notes}
    options |= {"epsilon": radius, "source": subject.diagnosis_source, "whole": subject.whole, "progress": True}
    diagnosis = diagnose(subject.network, subject.split, **options)
    signs = {True: "yes", False: "NO", None: "?"}
    for check in diagnosis.checks:
        print(f"{signs[check.passed]:5}{check.name}: {check.figures}")
    strongest = diagnosis.strongest
    interval = "{:.2%} - {:.2%}".format(*strongest.confidence_interval)
    figure = "robust accuracy" if diagnosis.trustworthy else "an upper bound, not a robust accuracy"
    print(f"\nis the evaluation trustworthy? {diagnosis.verdict}")
    print(
        f"left by {strongest.attack}: {strongest.accuracy:.2%} ({interval}; epsilon {epsilon_text(radius)}): {figure}"
    )
    return diagnosis.report(str(path) if path else None)


def write_report(report: TestReport, subject: Prepared, args: Namespace) -> None:
    """Write the report and draw the figures, after which the notes are not needed.

    Raises UserError, and keeps the notes, if the checkpoint was replaced during the test.
    """
    from utils.checkpoints import check_unchanged
    from utils.formats import write_document

    if args.json:
        if subject.sha256:
            check_unchanged(args.checkpoint, subject.sha256)
        write_document(args.json, report, indent=2)
    if args.figures:
        draw_figures(report, subject, args.figures)
    if subject.notes:
        subject.notes.finish()


def draw_figures(report: TestReport, subject: Prepared, folder: Path) -> None:
    """Draw what the report says, and examples of FGSM at the smallest radius that fools the network mostly."""
    from utils import plotting

    plotting.save(plotting.accuracy_against_epsilon(report), folder / "accuracy.png")
    if report.minimal_epsilon:
        plotting.save(plotting.robustness_curve(report), folder / "robustness-curve.png")
    # The pictures of examples are made by FGSM in L-infinity, so only such radii suit them.
    attacks = [row for row in report.attacks if row.norm == "linf"]
    rows = [row for row in attacks if row.name == "fgsm"] or attacks
    if rows:
        broken = [row.epsilon for row in rows if row.epsilon and row.accuracy < 0.5]
        radius = min(broken, default=max(row.epsilon for row in rows))
        examples = plotting.adversarial_examples(subject.network, subject.split, radius, source=subject.source)
        plotting.save(examples, folder / "examples.png")
