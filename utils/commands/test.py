"""TODO: utils.commands.test."""

import json
from dataclasses import asdict
from importlib.util import find_spec

from utils.commands.parser import (
    Parser,
    check_writable,
    default_checkpoint,
    default_checkpoints,
    epsilon,
    file_path,
    load_network,
    pick_device,
    positive_int,
    run,
    seed,
)
from utils.constants import ARCHITECTURES, DATASETS, EPSILONS, EVALUATION_BATCH, SPLITS, UserError
from utils.quoting import shown


def test_script(network):
    """Test a checkpoint of the network of that name as the command line says; the body of test-*.py."""
    parser = Parser(
        f"test-{network}.py",
        f"Test a {network} checkpoint on clean images and under attack, with 95 % Wilson intervals.",
        [
            "--data-dir data --attack fgsm --epsilon 0.02 8/255 --json out.json",
            "--checkpoint runs/digits.safetensors --split validation --figures runs/digits",
        ],
    )
    option = parser.add_argument
    option("--dataset", choices=DATASETS, help="what to test on (default: what the checkpoint was trained on)")
    option("--seed", type=seed, default=0, help="of the attacks' random numbers; FGSM has none (default 0)")
    option(
        "--checkpoint",
        type=file_path,
        metavar="FILE",
        help=f"the network to test ({default_checkpoints(network)})",
    )
    option(
        "--attack",
        nargs="+",
        choices=["fgsm", "pgd", "autoattack"],
        default=["fgsm"],
        help="attacks to run (default fgsm); fgsm comes first, in one pass for all radii",
    )
    option(
        "--epsilon",
        nargs="+",
        type=epsilon,
        metavar="E",
        help="L-infinity radii in pixel units, such as 0.02 or 8/255 (default: the study's 0.02 to 0.1 for fgsm, 8/255 "
        "for the others)",
    )
    option("--steps", type=positive_int, help="of pgd (default 20)")
    option("--step-size", type=epsilon, help="of pgd, in pixel units (default 2.5 epsilon / steps)")
    option("--restarts", type=positive_int, help="of pgd, each from another random start (default 1)")
    option(
        "--loss",
        choices=("cross_entropy", "margin"),
        help="that pgd climbs (default cross_entropy)",
    )
    option(
        "--source",
        type=file_path,
        metavar="CHECKPOINT",
        help="craft the examples on this checkpoint's gradient and transfer them (default: on the tested network's "
        "own, white-box)",
    )
    option("--split", choices=SPLITS, default="test", help="the images to test on (default test)")
    option("--examples", type=positive_int, metavar="N", help="test on the first N images alone (default all)")
    option("--batch-size", type=positive_int, default=EVALUATION_BATCH, help="images at once (default %(default)s)")
    option(
        "--diagnose",
        action="store_true",
        help="then check at the first epsilon, by default 8/255, whether the figures can be trusted: signs of masked "
        "gradients and of label leaking, and what the strongest attack leaves (--source: by default a baseline)",
    )
    option("--json", type=file_path, metavar="FILE", help="write the figures to this file")
    option("--figures", type=file_path, metavar="FOLDER", help="draw accuracy.png and examples.png into this folder")
    args = parser.parse_args()
    args.pgd = {name: getattr(args, name) for name in ("steps", "step_size", "restarts", "loss")}
    args.pgd = {name: value for name, value in args.pgd.items() if value is not None}
    if args.pgd and "pgd" not in args.attack:
        parser.error(f"--{next(iter(args.pgd)).replace('_', '-')} belongs to --attack pgd")
    args.checkpoint = args.checkpoint or default_checkpoint(network, args.dataset or "cifar10")
    hint = "; finished batches are kept: the same command goes on after them" if args.json else ""
    run(parser, lambda: test_command(network, args), hint, output=args.json)


def test_command(network_name, args):
    import torch

    from utils.allocator import keep_freed_memory
    from utils.distributed import from_main, joined
    from utils.evaluation import multiply_adds

    with joined():
        device = pick_device(args.device)
        report, split, networks, through, notes = from_main(lambda: prepare_test(network_name, args))
        split = split.to(device)
        network, source, other = (network and network.to(device) for network in networks)
        torch.manual_seed(args.seed)
        keep_freed_memory()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(
            f"{args.checkpoint}: {network_name}, width {network.arguments['width']}, {parameters:,} parameters, "
            f"{multiply_adds(network):,} multiply-adds an image\n"
            f"{split.dataset} {split.name} split, {len(split):,} images, {device}"
        )
        report |= attack_table(network, split, source, notes, args)
        if args.diagnose:
            report["diagnosis"] = print_diagnosis(network, split, through, other, notes, args)
        from_main(lambda: write_report(report, network, split, source, notes, args))


def prepare_test(network_name, args):
    """Whatever may be missing or damaged is found so here, before hours of attacks.

    Returns the opening of the report, the split, three networks (the tested, the source or None, and what --diagnose
    transfers from or None), the last one's path or None, and Notes if there is a file to write; all on the CPU.
    """
    for path in (args.json, args.figures and args.figures / "accuracy.png"):
        if path:
            check_writable(path)
    for tested in filter(None, (args.checkpoint, args.source)):
        if args.json and args.json.resolve() == tested.resolve():
            raise UserError(f"--json {args.json} is the network to be tested, or its --source, and would replace it")
    if ("autoattack" in args.attack or args.diagnose) and not find_spec("pyautoattack"):
        raise UserError("AutoAttack and --diagnose need the package pyautoattack: pip install pyautoattack")

    from utils.checkpoints import file_digest, read_metadata
    from utils.data import load_split
    from utils.files import beside
    from utils.notes import Notes

    dataset = args.dataset or read_metadata(args.checkpoint).dataset
    if dataset not in DATASETS:
        raise UserError(f"{args.checkpoint} was trained on {shown(dataset)}, which is none of {', '.join(DATASETS)}")
    split = load_split(dataset, args.split, args.data_dir).first(args.examples)
    network = load_network(args.checkpoint, split, network_name)
    source = load_network(args.source, split) if args.source else None
    through, other = args.source, source
    if args.diagnose and not args.source:
        through = a_baseline(split, network_name, args.checkpoint)
        other = through and load_network(through, split)
    notes = Notes(beside(args.json, ".attacks.partial.jsonl")) if args.json else None
    report = {
        "checkpoint": str(args.checkpoint),
        "sha256": file_digest(args.checkpoint),
        "network": network_name,
        "dataset": dataset,
        "split": split.name,
        "examples": len(split),
    }
    return report, split, (network, source, other), through, notes


def write_report(report, network, split, source, notes, args):
    """Write the file, and so be done with the notes, and draw the figures that were asked for."""
    from utils.files import write_atomically

    if args.json:
        write_atomically(args.json, (json.dumps(report, indent=2) + "\n").encode())
        notes.finish()
    if args.figures:
        from utils import plotting

        plotting.save(plotting.accuracy_against_epsilon(report), args.figures / "accuracy.png")
        # FGSM at the smallest radius that fools the network more often than not.
        rows = [row for row in report["attacks"] if row["name"] == "fgsm"] or report["attacks"]
        broken = [row["epsilon"] for row in rows if row["epsilon"] and row["accuracy"] < 0.5]
        shown = min(broken, default=max(row["epsilon"] for row in rows))
        plotting.save(
            plotting.adversarial_examples(network, split, shown, source=source), args.figures / "examples.png"
        )


def attack_table(network, split, source, notes, args):
    """Run the attacks, print a line for each, and return what the report says of them."""
    from utils.evaluation import evaluate, evaluate_fgsm, report_row

    setting = "white_box" if source is None else "transfer"
    common = {"source": source, "batch_size": args.batch_size, "progress": True}
    radii = {attack: args.epsilon or (EPSILONS[1:] if attack == "fgsm" else [8 / 255]) for attack in args.attack}
    options = {"pgd": {**args.pgd, "seed": args.seed}, "autoattack": {"seed": args.seed}}
    print(f"\n{'attack':12}{'setting':11}{'epsilon':>8}{'accuracy':>10}{'95 % interval':>17}{'seconds':>9}")
    clean, *attacked = evaluate_fgsm(network, split, radii.get("fgsm", []), **common)
    print_row("clean", "", clean)
    for result in attacked:
        print_row(result.attack, setting, result)
    for attack in args.attack:
        if attack != "fgsm":
            for radius in radii[attack]:
                result = evaluate(network, split, attack, radius, options=options[attack], notes=notes, **common)
                print_row(attack, setting, result)
                attacked.append(result)
    return {
        "clean_accuracy": clean.accuracy,
        "clean_confidence_interval": clean.confidence_interval,
        "attacks": [
            {**report_row(result, setting), "source": str(args.source) if args.source else None} for result in attacked
        ],
    }


def print_diagnosis(network, split, path, source, notes, args):
    """Run and print the checks of utils.diagnostics, and return what the report says of them."""
    from utils.diagnosis import diagnose

    radius = args.epsilon[0] if args.epsilon else 8 / 255
    print(f"\ncan these figures be trusted? Checks at epsilon {radius:.4g}, source {path or 'none'}:\n")
    common = {"seed": args.seed, "batch_size": args.batch_size, "notes": notes, "progress": True}
    diagnosis = diagnose(network, split, epsilon=radius, source=source, **common)
    signs = {True: "yes", False: "NO", None: "?"}
    for check in (*diagnosis.checks, diagnosis.leak):
        print(f"{signs[check.passed]:5}{check.name}: {check.figures}")
    strongest = diagnosis.strongest
    low, high = strongest.confidence_interval
    print(
        f"\nis the evaluation trustworthy? {diagnosis.verdict}\n"
        f"robust accuracy under the strongest attack: {strongest.accuracy:.2%} ({low:.2%} - {high:.2%}; "
        f"{strongest.attack}, epsilon {radius:.4g})"
    )
    return {
        "epsilon": radius,
        "source": str(path) if path else None,
        "verdict": diagnosis.verdict,
        "trustworthy": diagnosis.trustworthy,
        "robust_accuracy": strongest.accuracy,
        "confidence_interval": strongest.confidence_interval,
        "checks": [asdict(check) for check in (*diagnosis.checks, diagnosis.leak)],
    }


def a_baseline(split, network_name, tested):
    """A shipped baseline to transfer from: of the same architecture unless it is the one tested; None without any."""
    from utils.checkpoints import file_digest

    for name in sorted(ARCHITECTURES, key=lambda name: name != network_name):
        path = default_checkpoint(name, split.dataset)
        if path.exists() and file_digest(path) != file_digest(tested):
            return path
    return None


def print_row(name, setting, result):
    interval = "{:.2%} - {:.2%}".format(*result.confidence_interval)
    print(
        f"{name:12}{setting:11}{result.epsilon:8.4f}{result.accuracy:10.2%}{interval:>17}{result.seconds:9.1f}",
        flush=True,
    )
