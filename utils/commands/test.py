"""The command line of test-*.py: one network on clean images and under attack, printed and written as a report."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.commands import types
from utils.commands.checkpoints import default_checkpoint, default_checkpoints, find_baseline, load_network
from utils.commands.parser import Parser, check_writable, pick_device, run
from utils.constants import DATASETS, EPSILONS, EVALUATION_BATCH, RADIUS, SPLITS, UserError
from utils.formats import AttackRow, DiagnosisReport, TestReport
from utils.quoting import shown

if TYPE_CHECKING:
    from torch import nn

    from utils.data import Split
    from utils.evaluation import Result
    from utils.notes import Notes

PGD_OPTIONS = ("steps", "step_size", "restarts", "loss")


def test_script(network: str) -> None:
    """Test a checkpoint as the command line says: the body of test-*.py. network: a key of networks.NETWORKS."""
    parser = test_parser(network)
    args = parser.parse_args()
    args.pgd = {name: getattr(args, name) for name in PGD_OPTIONS if getattr(args, name) is not None}
    if args.pgd and "pgd" not in args.attack:
        parser.error(f"--{next(iter(args.pgd)).replace('_', '-')} belongs to --attack pgd")
    args.checkpoint = args.checkpoint or default_checkpoint(network, args.dataset or "cifar10")
    run(parser, lambda: test_command(network, args), output=args.json)


def test_parser(network: str) -> Parser:
    """The parser of test-*.py."""
    parser = Parser(
        f"test-{network}.py",
        f"Test a {network} checkpoint on clean images and under attack, with 95 % Wilson intervals.",
        [
            "--data-dir data --attack fgsm --epsilon 0.02 8/255 --json out.json",
            "--checkpoint runs/digits.safetensors --split validation --figures runs/digits",
        ],
    )
    option = parser.data.add_argument
    option("--dataset", choices=DATASETS, help="the data set to test on (default: the one of the training)")
    option("--split", choices=SPLITS, default="test", help="the images to test on (default test)")
    option("--examples", type=types.positive_int, metavar="N", help="test only on the first N images (default all)")
    option(
        "--batch-size",
        type=types.positive_int,
        default=EVALUATION_BATCH,
        help="images in a batch (default %(default)s)",
    )
    parser.add_argument_group("network").add_argument(
        "--checkpoint",
        type=types.file_path,
        metavar="FILE",
        help=f"the network to test ({default_checkpoints(network)})",
    )
    add_attack_flags(parser)
    option = parser.add_argument_group("output").add_argument
    option("--json", type=types.file_path, metavar="FILE", help="write the report to this file")
    option(
        "--figures", type=types.file_path, metavar="FOLDER", help="draw accuracy.png and examples.png into this folder"
    )
    return parser


def add_attack_flags(parser: Parser) -> None:
    """Add the flags that choose the attacks and their options."""
    option = parser.add_argument_group("attack").add_argument
    text = "the attacks to run (default fgsm); fgsm comes first, in one pass for all radii"
    option("--attack", nargs="+", choices=["fgsm", "pgd", "autoattack"], default=["fgsm"], help=text)
    text = "L-infinity radii in pixel units, such as 0.02 or 8/255 (default for fgsm 0.02 to 0.1, for the others 8/255)"
    option("--epsilon", nargs="+", type=types.epsilon, metavar="E", help=text)
    option("--steps", type=types.positive_int, help="steps of pgd (default 20)")
    option("--step-size", type=types.epsilon, help="step size of pgd, in pixel units (default 2.5 epsilon / steps)")
    option("--restarts", type=types.positive_int, help="random starts of pgd (default 1)")
    option("--loss", choices=("cross_entropy", "margin"), help="the loss that pgd increases (default cross_entropy)")
    text = "craft the examples on this network and transfer them (default: craft on the tested network, white-box)"
    option("--source", type=types.file_path, metavar="CHECKPOINT", help=text)
    option("--seed", type=types.seed, default=0, help="of the attacks' random numbers; fgsm uses none (default 0)")
    text = (
        "then check whether the figures can be trusted, at the first epsilon or else 8/255: look for masked gradients "
    )
    text += "and label leaking, and measure the accuracy under all attacks together. Examples for transfer come from "
    text += "--source or else from a baseline"
    option("--diagnose", action="store_true", help=text)


@dataclass
class Subject:
    """Everything that the attacks need, loaded and checked."""

    sha256: str  # of the checkpoint
    split: Split
    network: nn.Module
    source: nn.Module | None  # crafts the examples; None: the network itself
    diagnosis_path: Path | None  # of the checkpoint that crafts what --diagnose transfers
    diagnosis_source: nn.Module | None
    notes: Notes | None  # finished batches, if there is a report to write


def test_command(network_name: str, args: Namespace) -> None:
    """Load, attack, print, and write the report and the figures."""
    import torch

    from networks.cost import multiply_adds
    from utils.allocator import keep_freed_memory
    from utils.distributed import from_main, joined

    with joined():
        device = pick_device(args.device)
        subject = from_main(lambda: prepare_test(network_name, args))
        subject.split = split = subject.split.to(device)
        for each in (subject.network, subject.source, subject.diagnosis_source):
            if each is not None:
                each.to(device)
        network: Any = subject.network
        torch.manual_seed(args.seed)
        keep_freed_memory()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(
            f"{args.checkpoint}: {network_name}, width {network.arguments['width']}, {parameters:,} parameters, "
            f"{multiply_adds(network):,} multiply-adds an image\n"
            f"{split.dataset} {split.name} split, {len(split):,} images, {device}"
        )
        try:
            clean, rows = attack_table(subject, args)
            diagnosis = print_diagnosis(subject, args) if args.diagnose else None
        except KeyboardInterrupt:
            kept = subject.notes and subject.notes.rows
            hint = "the finished batches are kept, and the same command continues after them" if kept else ""
            raise KeyboardInterrupt(hint) from None
        report = TestReport(
            checkpoint=str(args.checkpoint),
            sha256=subject.sha256,
            network=network_name,
            dataset=split.dataset,
            split=split.name,
            examples=len(split),
            clean_accuracy=clean.accuracy,
            clean_confidence_interval=clean.confidence_interval,
            attacks=rows,
            diagnosis=diagnosis,
        )
        from_main(lambda: write_report(report, subject, args))


def prepare_test(network_name: str, args: Namespace) -> Subject:
    """Load everything onto the CPU. Raises UserError for whatever is missing or damaged, before hours of attacks."""
    from utils.checkpoints import file_digest, read_metadata
    from utils.data import load_split
    from utils.files import beside
    from utils.notes import Notes

    for path in (args.json, args.figures and args.figures / "accuracy.png"):
        if path:
            check_writable(path)
    for tested in filter(None, (args.checkpoint, args.source)):
        if args.json and args.json.resolve() == tested.resolve():
            raise UserError(f"--json {args.json} is the tested network or its --source, and would replace it")
    if ("autoattack" in args.attack or args.diagnose) and not find_spec("pyautoattack"):
        raise UserError("AutoAttack and --diagnose need the package pyautoattack: pip install pyautoattack")
    dataset = args.dataset or read_metadata(args.checkpoint).dataset
    if dataset not in DATASETS:
        raise UserError(f"{args.checkpoint} was trained on {shown(dataset)}, not on {' or '.join(DATASETS)}")
    split = load_split(dataset, args.split, args.data_dir).first(args.examples)
    network = load_network(args.checkpoint, split, network_name)
    source = load_network(args.source, split) if args.source else None
    diagnosis_path, diagnosis_source = args.source, source
    if args.diagnose and not source:
        diagnosis_path = find_baseline(split, network_name, args.checkpoint)
        diagnosis_source = load_network(diagnosis_path, split) if diagnosis_path else None
    notes = Notes(beside(args.json, ".attacks.partial.jsonl")) if args.json else None
    sha256 = file_digest(args.checkpoint)
    return Subject(sha256, split, network, source, diagnosis_path, diagnosis_source, notes)


def attack_table(subject: Subject, args: Namespace) -> tuple[Result, list[AttackRow]]:
    """Run the attacks and print a line for each. Returns the result on clean images, and a row for each attack."""
    from utils.evaluation import evaluate, evaluate_fgsm, report_row

    setting = "white_box" if subject.source is None else "transfer"
    common = {"source": subject.source, "batch_size": args.batch_size, "progress": True}
    radii = {attack: args.epsilon or (EPSILONS[1:] if attack == "fgsm" else [RADIUS]) for attack in args.attack}
    options = {"pgd": {**args.pgd, "seed": args.seed}, "autoattack": {"seed": args.seed}}
    print(f"\n{'attack':12}{'setting':11}{'epsilon':>8}{'accuracy':>10}{'95 % interval':>17}{'seconds':>9}")
    clean, *attacked = evaluate_fgsm(subject.network, subject.split, radii.pop("fgsm", []), **common)
    print_row("clean", "", clean)
    for result in attacked:
        print_row(result.attack, setting, result)
    common["notes"] = subject.notes
    for attack, of_attack in radii.items():
        for radius in of_attack:
            result = evaluate(subject.network, subject.split, attack, radius, options=options[attack], **common)
            print_row(attack, setting, result)
            attacked.append(result)
    source = str(args.source) if args.source else None
    return clean, [report_row(result, setting, source) for result in attacked]


def print_row(name: str, setting: str, result: Result) -> None:
    """Print a line of the table of attacks."""
    interval = "{:.2%} - {:.2%}".format(*result.confidence_interval)
    print(
        f"{name:12}{setting:11}{result.epsilon:8.4f}{result.accuracy:10.2%}{interval:>17}{result.seconds:9.1f}",
        flush=True,
    )


def print_diagnosis(subject: Subject, args: Namespace) -> DiagnosisReport:
    """Run and print the checks of utils.diagnosis."""
    from utils.diagnosis import diagnose

    radius = args.epsilon[0] if args.epsilon else RADIUS
    path = subject.diagnosis_path
    print(f"\ncan these figures be trusted? Checks at epsilon {radius:.4g}, source {path or 'none'}:\n")
    diagnosis = diagnose(
        subject.network,
        subject.split,
        epsilon=radius,
        source=subject.diagnosis_source,
        seed=args.seed,
        batch_size=args.batch_size,
        notes=subject.notes,
        progress=True,
    )
    signs = {True: "yes", False: "NO", None: "?"}
    for check in diagnosis.checks:
        print(f"{signs[check.passed]:5}{check.name}: {check.figures}")
    strongest = diagnosis.strongest
    low, high = strongest.confidence_interval
    print(
        f"\nis the evaluation trustworthy? {diagnosis.verdict}\n"
        f"robust accuracy under the strongest attack: {strongest.accuracy:.2%} ({low:.2%} - {high:.2%}; "
        f"{strongest.attack}, epsilon {radius:.4g})"
    )
    return diagnosis.report(str(path) if path else None)


def write_report(report: TestReport, subject: Subject, args: Namespace) -> None:
    """Write the report, after which the notes are not needed, and draw the figures."""
    from utils.formats import write_document

    if args.json:
        write_document(args.json, report, indent=2)
        if subject.notes:
            subject.notes.finish()
    if args.figures:
        from utils import plotting

        plotting.save(plotting.accuracy_against_epsilon(report), args.figures / "accuracy.png")
        # Show FGSM at the smallest radius that fools the network more often than not.
        rows = [row for row in report.attacks if row.name == "fgsm"] or report.attacks
        broken = [row.epsilon for row in rows if row.epsilon and row.accuracy < 0.5]
        radius = min(broken, default=max(row.epsilon for row in rows))
        examples = plotting.adversarial_examples(subject.network, subject.split, radius, source=subject.source)
        plotting.save(examples, args.figures / "examples.png")
