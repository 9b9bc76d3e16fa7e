"""The command line: arguments, start-up checks and output of the train, test and study scripts.

Torch is imported where it is first needed, so that `--help` and mistakes are answered at once.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from utils import ARCHITECTURES, DATASETS, EVALUATION_BATCH, LARGEST_WIDTH, SPLITS, UserError, checkpoint_stem
from utils.locks import locked
from utils.paper import EPSILONS, TRAINING_EPSILONS
from utils.recipes import RECIPES
from utils.untrusted import one_line, shown

DEMO = Path("results/demo")  # all that the study writes on digits, for which nobody waits long
ONLINE = ("fgsm", "n-fgsm", "pgd", "trades")  # the defences that are losses, utils.defenses.DEFENSES
LARGEST_NUMBER = 10**9  # of epochs, images, steps; a learning rate
LARGEST_INT = 2**63 - 1  # torch's integers have 64 bits
RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many those are


class Parser(argparse.ArgumentParser):
    """A script's parser, with the flags that all scripts share; a mistake is answered in one line."""

    def __init__(self, script, description, examples):
        super().__init__(
            prog=script,
            description=description,
            epilog="\n".join(["examples:", *(f"  python {script} {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--data-dir",
            type=file_path,
            metavar="FOLDER",
            help="holds the data sets, downloaded into it on first use (default $DATA_DIR, else data)",
        )
        self.add_argument(
            "--device",
            choices=("auto", "cuda", "mps", "cpu"),
            default="auto",
            help="default auto: the first there is of cuda, mps, cpu",
        )

    def add_training_flags(self):
        """What whoever trains may set, one network or the whole study."""
        self.add_argument("--dataset", choices=DATASETS, default="cifar10", help="what to train on (default cifar10)")
        self.add_argument(
            "--width", type=width, default=32, help="channels of the first convolution (default 32, the study's)"
        )
        self.add_argument(
            "--precision",
            choices=("float32", "bfloat16"),
            default="float32",
            help="of the training steps (default float32); bfloat16 halves their time on GPUs and on CPUs that compute "
            "in it (AVX512_BF16, AMX), and multiplies it on others",
        )
        self.add_argument("--quiet", action="store_true", help="print errors alone")

    def parse_args(self, *arguments):  # type: ignore[override]
        if isinstance(sys.stdout, io.TextIOWrapper):  # it may be none, or of a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal of ASCII cannot show
        return super().parse_args(*arguments)

    def exit(self, status=0, message=None):
        try:
            print(end="", flush=True)
        except OSError:  # a closed pipe, a full disk: Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        super().exit(status, message)

    def error(self, message):
        # Of many processes all make the same mistake: one says so, before another's end has torchrun end it.
        time.sleep(1 if RANK else 0)
        self.exit(2, None if RANK else f"{self.prog}: error: {message} (--help explains every flag)\n")

    def refuse_many_processes(self):
        if WORLD_SIZE > 1:
            self.error("torchrun is for train-*.py and test-*.py, this is for one process")


def train_script(network):
    """Train the network of that name as the command line says; the body of train-*.py."""
    parser = Parser(
        f"train-{network}.py",
        f"Train the {network} network, with or without a defence, and save it as a safetensors checkpoint.",
        [
            f"--data-dir data --epochs 10 --output runs/{network}.safetensors",
            f"--defense fgsm-augment --epsilon 0.2 --output runs/{network}-fgsm-augment-0.2.safetensors",
        ],
    )

    def defaults(field):
        return ", ".join(f"{name} {getattr(recipe, field)}" for name, recipe in RECIPES.items())

    option = parser.add_argument
    parser.add_training_flags()
    option("--seed", type=seed, default=0, help="of initial weights, shuffling and augmentation (default 0)")
    option(
        "--recipe",
        choices=RECIPES,
        default="one-cycle",
        help="the numbers that the flags from --epochs to --average replace one by one: one-cycle (ours, the default: "
        "SGD, label smoothing, flips and shifts), long (likewise, 80 epochs: the shipped baselines'), retrain, "
        "retrain-sgd and retrain-large (for fgsm-augment: flips alone, the first with Adam, the last for radii such as "
        "0.2), short (four epochs) or paper (the study's: Adam, flips alone)",
    )
    option(
        "--defense",
        choices=["none", "fgsm-augment", *ONLINE],
        default="none",
        help="fgsm-augment, the study's: train on the clean images and on as many FGSM examples of a trained network; "
        "fgsm, n-fgsm, pgd, trades: on examples crafted on the network itself in every step. All without label "
        "smoothing (default none: on the clean images alone)",
    )
    option(
        "--epsilon",
        type=radius,
        metavar="E",
        help="L-infinity radius of the defence, such as 0.2 or 8/255 (default 8/255; fgsm-augment has none)",
    )
    option("--steps", type=positive_int, help="of the attack in pgd and trades (default 7)")
    option("--beta", type=positive_float, help="weight of the robust term in trades (default 6)")
    option(
        "--crafting",
        choices=("training", "evaluation"),
        help="mode of batch norm while fgsm, n-fgsm, pgd and trades craft (default training; evaluation did no better)",
    )
    option(
        "--source",
        type=file_path,
        metavar="CHECKPOINT",
        help=f"the network whose gradient fgsm-augment takes ({default_checkpoints(network)})",
    )
    option(
        "--epochs",
        type=positive_int,
        help=f"passes over the training images (default {defaults('epochs')})",
    )
    option("--batch-size", type=positive_int, help=f"images a step (default {defaults('batch_size')})")
    option("--lr", type=positive_float, help=f"highest learning rate (default {defaults('lr')})")
    option("--weight-decay", type=weight_decay, help=f"L2 penalty (default {defaults('weight_decay')})")
    option("--shift", type=shift, help=f"augmentation: by up to so many pixels (default {defaults('shift')})")
    option(
        "--contrast",
        type=contrast,
        metavar="C",
        help=f"augmentation: scaled by a random factor from C to 1 (default {defaults('contrast')})",
    )
    option(
        "--average",
        type=fraction,
        metavar="A",
        help="keep a moving average of the weights, of which so much stays in each step, such as 0.999; 0 keeps the "
        f"last weights (default {defaults('average')})",
    )
    option(
        "--output",
        type=file_path,
        metavar="FILE",
        help=f"the checkpoint to write, its log beside it as .jsonl ({default_checkpoints(network)}; with a defence, "
        "its name and epsilon are added)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the output, once the training is done")
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run, given the same flags, from its last finished epoch (to the "
        "bit-identical end on the same CPU with as many threads); if there is none, start it",
    )
    args = parser.parse_args()
    belongs = {"epsilon": ("fgsm-augment", *ONLINE), "source": ("fgsm-augment",)}
    belongs |= {"steps": ("pgd", "trades"), "beta": ("trades",), "crafting": ONLINE}
    for flag, defenses in belongs.items():
        if getattr(args, flag) is not None and args.defense not in defenses:
            parser.error(f"--{flag} belongs to --defense {' or '.join(defenses)}")
    if args.defense == "fgsm-augment" and not args.epsilon:
        parser.error("--defense fgsm-augment needs --epsilon")
    if args.defense in ONLINE:
        args.epsilon = args.epsilon or 8 / 255
    args.source = args.source or default_checkpoint(network, args.dataset)
    args.output = args.output or default_checkpoint(network, args.dataset, args.epsilon, args.defense)
    if args.output.suffix != ".safetensors":
        parser.error(f"--output {args.output}: a checkpoint's name ends in .safetensors")
    replaced = {
        name: getattr(args, name)
        for name in ("epochs", "batch_size", "lr", "weight_decay", "shift", "contrast", "average")
    }
    recipe = replace(RECIPES[args.recipe], **{name: value for name, value in replaced.items() if value is not None})
    recipe = recipe if args.defense == "none" else recipe.with_defense()
    run(
        parser,
        lambda: train_command(network, args, recipe),
        hint="; the last finished epoch, if any, is saved: --resume"
        + (" in place of --overwrite" if args.overwrite else "")
        + ", with the same flags, continues after it",
        output=args.output,
    )


def train_command(network, args, recipe):
    from utils.distributed import from_main, joined
    from utils.training import train

    with joined():
        device = pick_device(args.device)
        prepared = from_main(lambda: prepare_training(network, args, recipe, device))
        if prepared is None:
            return
        training, validation, defense = prepared
        train(
            network,
            training,
            validation,
            recipe,
            output=args.output,
            width=args.width,
            seed=args.seed,
            device=device,
            precision=args.precision,
            defense=defense,
            resume=args.resume,
            quiet=args.quiet,
        )
        if not args.quiet:
            print(f"saved {args.output}")


def prepare_training(network, args, recipe, device):
    """Training and validation split and the defence, or None if there is nothing left to be trained."""
    from utils.adversarial import FOLDER, AugmentedSplit, adversarial_set
    from utils.checkpoints import file_digest, read_metadata
    from utils.data import load_split
    from utils.defenses import DEFENSES
    from utils.training import PartialRun, check_same_arguments, training_arguments

    partial = PartialRun(args.output)
    existing = [path for path in (partial.state, partial.output, partial.log) if path.exists()]
    if existing and not (args.overwrite or args.resume):
        if partial.exists():
            raise UserError(f"{partial.state} is an interrupted run: --resume continues it, --overwrite starts again")
        raise UserError(f"{existing[0]} exists: --overwrite replaces it, --output names another file")
    check_writable(args.output)
    if args.defense == "fgsm-augment":
        read_metadata(args.source)  # before a download, that is
        if args.source.resolve() == args.output.resolve():
            raise UserError(f"--output {args.output} is the --source, and would replace it")
        check_writable(FOLDER / "set")
    training = load_split(args.dataset, "train", args.data_dir)
    validation = load_split(args.dataset, "validation", args.data_dir)
    defense = None
    if args.defense == "fgsm-augment":
        # Its images come later, if they are needed.
        training = AugmentedSplit(training, None, args.epsilon, file_digest(args.source))  # type: ignore[arg-type]
    elif args.defense in ONLINE:
        numbers = {
            name: getattr(args, name) for name in ("epsilon", "steps", "beta", "crafting") if getattr(args, name)
        }
        defense = DEFENSES[args.defense](**numbers)
    if args.resume and args.output.exists() and not partial.exists():
        wanted = training_arguments(network, training, recipe, width=args.width, seed=args.seed, defense=defense)
        check_same_arguments(args.output, read_metadata(args.output).get("training"), wanted)
        if not args.quiet:
            print(f"{args.output} is finished: nothing to resume")
        return None
    if args.defense == "fgsm-augment":
        signs = adversarial_set(args.source, training.clean, device=device, progress=not args.quiet)
        training = replace(training, direction=signs.direction)
    if not args.quiet:
        defended = f", {args.defense} at {args.epsilon:g}" if args.epsilon else ""
        print(f"training {network}, width {args.width}, on {len(training):,} {args.dataset} images{defended}, {device}")
    return training, validation, defense


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
    from utils.evaluation import Notes

    dataset = args.dataset or read_metadata(args.checkpoint)["dataset"]
    if dataset not in DATASETS:
        raise UserError(f"{args.checkpoint} was trained on {shown(dataset)}, which is none of {', '.join(DATASETS)}")
    split = load_split(dataset, args.split, args.data_dir).first(args.examples)
    network = load_network(args.checkpoint, split, network_name)
    source = load_network(args.source, split) if args.source else None
    through, other = args.source, source
    if args.diagnose and not args.source:
        through = a_baseline(split, network_name, args.checkpoint)
        other = through and load_network(through, split)
    notes = Notes(args.json.with_suffix(".attacks.partial.jsonl")) if args.json else None
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
    from utils.checkpoints import write_atomically

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


def load_network(path, split, name=None):
    """A checkpoint's network, on the CPU. Raises UserError unless it fits the split, and the name if any."""
    from utils.checkpoints import load_checkpoint, read_metadata

    metadata = read_metadata(path)
    if name and metadata["network"] != name:
        raise UserError(f"{path} holds a {metadata['network']}, not a {name}")
    if metadata["dataset"] != split.dataset:
        raise UserError(f"{path} was trained on {shown(metadata['dataset'])}, not on {split.dataset}")
    if metadata["class_names"] != list(split.class_names):
        raise UserError(f"{path} tells other classes apart than {split.dataset} has")
    return load_checkpoint(path)


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
    from utils.diagnostics import diagnose

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


def study_script():
    """Do the whole study, or what remains of it, as the command line says; the body of study.py."""
    parser = Parser(
        "study.py",
        "The whole study, both networks: baselines, the four networks retrained on each one's FGSM examples, their "
        "accuracies under transferred and white-box FGSM, the study's own recipe, and three seeds. What is done is "
        "skipped, what was interrupted goes on.",
        ["--data-dir data", "--dataset digits"],
    )
    option = parser.add_argument
    parser.add_training_flags()
    option("--epochs", type=positive_int, help="of every training, for a quick look (default: each recipe's)")
    option(
        "--models",
        type=file_path,
        metavar="FOLDER",
        help="the ten networks of the tables; a baseline that is there is taken as it is (default models, for digits "
        f"{DEMO})",
    )
    option(
        "--scratch",
        type=file_path,
        metavar="FOLDER",
        help=f"the networks of the study's own recipe and of the seeds (default runs/study, for digits {DEMO})",
    )
    option(
        "--results",
        type=file_path,
        metavar="FOLDER",
        help=f"study.json, tables.md and, in study/, the figures (default results, for digits {DEMO})",
    )
    option(
        "--overwrite",
        action="store_true",
        help="train again what was trained with other arguments, or is damaged; baselines are taken as they are",
    )
    args = parser.parse_args()
    digits = args.dataset == "digits"
    args.models = args.models or (DEMO if digits else Path("models"))
    args.scratch = args.scratch or (DEMO if digits else Path("runs/study"))
    args.results = args.results or (DEMO if digits else Path("results"))
    parser.refuse_many_processes()
    hint = "; what is finished is kept: the same command goes on after it"
    run(parser, lambda: study_command(args), hint, output=args.results / "study.json")


def study_command(args):
    for folder in (args.models, args.scratch, args.results, args.results / "study"):
        check_writable(folder / "study.json")

    from utils import plotting, tables
    from utils.adversarial import FOLDER
    from utils.checkpoints import write_atomically
    from utils.study import Study

    check_writable(FOLDER / "set")
    study = Study(
        args.dataset,
        models=args.models,
        scratch=args.scratch,
        report=args.results / "study.json",
        data_dir=args.data_dir,
        width=args.width,
        epochs=args.epochs,
        device=pick_device(args.device),
        precision=args.precision,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    if not (study.todo or args.quiet):
        print("every network is trained and tested: nothing remains but tables and figures")
    report = study.run()
    write_atomically(args.results / "tables.md", tables.document(report).encode())
    for name, figure in plotting.study_figures(report).items():
        plotting.save(figure, args.results / "study" / f"{name}.png")
    for name in tables.networks(report):
        baseline, retrained, split = study.pair(name)
        title = f"{tables.TITLES[name]} baseline, and retrained on its examples at {max(TRAINING_EPSILONS):g}"
        figure = plotting.side_by_side(baseline, retrained, split, 0.1, title)
        plotting.save(figure, args.results / "study" / f"{name}-side-by-side.png")
    if not args.quiet:
        print(tables.summary(report))
        print(f"\nsee {args.results / 'tables.md'} and the figures in {args.results / 'study'}")


def robustness_script():
    """Test the baselines, the study's defence and the robust networks under every attack; the body of robustness.py."""
    parser = Parser(
        "robustness.py",
        "The baselines, the networks retrained on 0.2 and the robust networks under every attack, from transferred "
        "FGSM to AutoAttack. What the report has already is skipped, what was interrupted goes on.",
        ["--data-dir data", "--examples 100 --results runs/robustness"],
    )
    option = parser.add_argument
    option("--dataset", choices=DATASETS, default="cifar10", help="what to test on (default cifar10)")
    option("--models", type=file_path, metavar="FOLDER", help=f"the six networks (default models, for digits {DEMO})")
    option(
        "--results",
        type=file_path,
        metavar="FOLDER",
        help="robustness.json, robustness.md and, in robustness/, the figures, some of them of the logs in "
        f"defenses/, overfitting/ and tried/ (default results, for digits {DEMO})",
    )
    option(
        "--examples",
        type=positive_int,
        metavar="N",
        default=1000,
        help="attack the first N test images with PGD and AutoAttack, all with FGSM (default 1000)",
    )
    option(
        "--overwrite",
        action="store_true",
        help="replace what the report says of other checkpoints, versions or numbers of images",
    )
    option("--quiet", action="store_true", help="print errors alone")
    args = parser.parse_args()
    digits = args.dataset == "digits"
    args.models = args.models or (DEMO if digits else Path("models"))
    args.results = args.results or (DEMO if digits else Path("results"))
    parser.refuse_many_processes()
    hint = "; what is finished is kept: the same command goes on after it"
    run(parser, lambda: robustness_command(args), hint, output=args.results / "robustness.json")


def robustness_command(args):
    for folder in (args.results, args.results / "robustness"):
        check_writable(folder / "robustness.json")

    from utils import plotting, tables
    from utils.allocator import keep_freed_memory
    from utils.checkpoints import write_atomically
    from utils.data import load_split
    from utils.robustness import checkpoint_paths, measure, training_logs

    keep_freed_memory()
    split = load_split(args.dataset, "test", args.data_dir).to(pick_device(args.device))
    networks = {
        path: (name, load_network(path, split, name).to(split.device)) for name, path in checkpoint_paths(args.models)
    }
    path = args.results / "robustness.json"
    report = measure(networks, split, path, examples=args.examples, overwrite=args.overwrite, quiet=args.quiet)
    logs = training_logs(args.models, args.results)
    write_atomically(args.results / "robustness.md", tables.robustness_document(report, logs).encode())
    for name, figure in plotting.robustness_figures(report, logs, networks, split).items():
        plotting.save(figure, args.results / "robustness" / f"{name}.png")
    if not args.quiet:
        print(f"\nsee {args.results / 'robustness.md'} and the figures in {args.results / 'robustness'}")


def print_row(name, setting, result):
    interval = "{:.2%} - {:.2%}".format(*result.confidence_interval)
    print(
        f"{name:12}{setting:11}{result.epsilon:8.4f}{result.accuracy:10.2%}{interval:>17}{result.seconds:9.1f}",
        flush=True,
    )


def default_checkpoint(network, dataset, epsilon=None, defense="fgsm-augment"):
    """Where a network is kept that was trained on clean images, or with a defence at `epsilon`."""
    stem = checkpoint_stem(network if dataset == "cifar10" else f"{network}-{dataset}", epsilon, defense)
    return Path("models") / f"{stem}.safetensors"


def default_checkpoints(network):
    """What `--help` says of the default."""
    return f"default {default_checkpoint(network, 'cifar10')}, for digits {default_checkpoint(network, 'digits')}"


def epsilon(text):
    """An L-infinity radius: a decimal number or a fraction such as 8/255, at least 0."""
    numerator, slash, denominator = text.partition("/")
    try:
        value, divisor = float(numerator), float(denominator if slash else 1)
        value = value / divisor if isfinite(divisor) else divisor
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number and no fraction such as 8/255")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative, and a radius is not")
    return value


def radius(text):
    """An epsilon to train with, and so above 0."""
    value = epsilon(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a radius of 0 changes no image")
    return value


def positive_float(text):
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, and at most {LARGEST_NUMBER:,}")
    return value


def weight_decay(text):
    return 0.0 if text == "0" else positive_float(text)


def fraction(text):
    value = 0.0 if text == "0" else positive_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def contrast(text):
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1, which is an image's own contrast")
    return value


def whole_number(low, high):
    """An argparse type: a whole number from low to high."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return value

    return parse


positive_int = whole_number(1, LARGEST_NUMBER)
seed = whole_number(0, LARGEST_INT)
shift = whole_number(0, 31)  # a larger one would reflect an image more than once
width = whole_number(1, LARGEST_WIDTH)


def file_path(text):
    """A path, of whose name files, reports and a terminal can speak."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not in UTF-8") from None
    return Path(text)


def pick_device(name):
    import torch

    if WORLD_SIZE > 1:
        return device_of_this_process(name)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


def device_of_this_process(name):
    """Of many processes on a machine, each has a GPU of its own, or all share the CPU."""
    import torch

    count, index = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if name == "mps" or index >= count:
        raise UserError(f"each process needs a GPU and this machine has {count}: --device cpu, or fewer processes")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_writable(path):
    """Raise UserError unless a file can be made at `path`; its folder is made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is there and no file")
        # Not under the name to which another run may be writing, nor through a link that somebody left there.
        with tempfile.NamedTemporaryFile(prefix=".", suffix=".probe", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def run(parser, command, hint="", output=None):
    """Run a command; one line on stderr and status 2 for what the user can mend, 1 for a failing disk.

    output: a file that no other run may write meanwhile, if there is one.
    """
    who = f"{parser.prog}, rank {RANK}" if RANK else parser.prog
    # Without a line of our code, which says little to whoever did not write it.
    warnings.formatwarning = lambda message, *_, **__: f"{who}: warning: {one_line(message)}\n"
    try:
        with locked(output) if output and not RANK else contextlib.nullcontext():
            command()
            print(end="", flush=True)  # here, where a closed pipe is answered
    except KeyboardInterrupt as interrupt:
        parser.exit(130, None if RANK else f"{who}: interrupted{interrupt}{hint}\n")
    except UserError as error:
        parser.exit(2, f"{who}: error: {error}\n")
    except ValueError as error:
        from attacks import AttackError  # not above, for it takes torch

        if not isinstance(error, AttackError):
            raise
        parser.exit(2, f"{who}: error: {error}\n")
    except BrokenPipeError:  # whoever read the output, such as head, has gone: so do we, as a shell would have it
        parser.exit(128 + 13)
    except OSError as error:
        parser.exit(1, f"{who}: error: {error}\n")
