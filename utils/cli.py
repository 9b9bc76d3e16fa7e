"""The command line: arguments, start-up checks and output of the train and test scripts.

Torch is imported where it is first needed, so that `--help` and mistakes are answered at once.
"""

import argparse
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from utils import DATASETS, LARGEST_WIDTH, SPLITS, UserError
from utils.recipes import RECIPES

PAPER_EPSILONS = [0.02, 0.04, 0.06, 0.08, 0.1]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def train_script(network):
    """Train the network of that name as the command line says; the body of train-*.py."""
    script = f"train-{network}.py"
    parser = Parser(
        prog=script,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Train the {network} network on clean images and save it as a safetensors checkpoint.",
        epilog=f"""examples:
  python {script} --data-dir data --epochs 20
  python {script} --dataset digits --epochs 5 --output runs/first-try.safetensors""",
    )
    ours, paper = RECIPES["one-cycle"], RECIPES["paper"]
    add_common_arguments(parser)
    option = parser.add_argument
    option(
        "--recipe", choices=RECIPES, default="one-cycle",
        help="the numbers that --epochs, --batch-size and --lr replace one by one: one-cycle (ours, the default: SGD, "
        "label smoothing, flips and shifts) or paper (the study's: Adam, flips alone)",
    )  # fmt: skip
    option(
        "--epochs",
        type=positive_int,
        help=f"passes over the training images (default {ours.epochs}; paper {paper.epochs})",
    )
    option(
        "--batch-size", type=positive_int, help=f"images a step (default {ours.batch_size}; paper {paper.batch_size})"
    )
    option("--lr", type=positive_float, help=f"highest learning rate (default {ours.lr}; paper {paper.lr})")
    option("--width", type=width, default=32, help="channels of the first convolution (default 32, the study's)")
    option(
        "--output", type=Path, metavar="FILE",
        help=f"the checkpoint to write, its log beside it as .jsonl (default {default_checkpoint(network, 'cifar10')}, "
        f"for digits {default_checkpoint(network, 'digits')})",
    )  # fmt: skip
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the output, once the training is done")
    existing.add_argument(
        "--resume", action="store_true",
        help="continue an interrupted run, given the same flags, from its last finished epoch to the bit-identical "
        "end; if there is none, start it",
    )  # fmt: skip
    option("--quiet", action="store_true", help="print errors alone")
    args = parser.parse_args()
    args.dataset = args.dataset or "cifar10"
    args.output = args.output or default_checkpoint(network, args.dataset)
    replaced = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr")}
    recipe = replace(RECIPES[args.recipe], **{name: value for name, value in replaced.items() if value is not None})
    run(
        parser, lambda: train_command(network, args, recipe),
        hint="; if an epoch was finished, it is saved: --resume continues after it",
    )  # fmt: skip


def train_command(network, args, recipe):
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: a checkpoint's name ends in .safetensors")
    partial = args.output.with_suffix(".partial.safetensors")
    if not (args.overwrite or args.resume):
        if partial.exists():
            raise UserError(f"{partial} is an interrupted run: --resume continues it, --overwrite starts again")
        if args.output.exists():
            raise UserError(f"{args.output} exists: --overwrite replaces it, --output names another file")
    check_writable(args.output)

    from utils.checkpoints import read_metadata
    from utils.data import load_split
    from utils.training import check_same_arguments, train, training_arguments

    device = pick_device(args.device)
    if args.resume and args.output.exists() and not partial.exists():
        wanted = training_arguments(network, args.dataset, recipe, width=args.width, seed=args.seed)
        check_same_arguments(args.output, read_metadata(args.output).get("training"), wanted)
        print(f"{args.output} is finished: nothing to resume")
        return
    training = load_split(args.dataset, "train", args.data_dir)
    validation = load_split(args.dataset, "validation", args.data_dir)
    if not args.quiet:
        print(f"training {network}, width {args.width}, on {len(training):,} {args.dataset} images, {device}")
    train(
        network, training, validation, recipe, output=args.output,
        width=args.width, seed=args.seed, device=device, resume=args.resume, quiet=args.quiet,
    )  # fmt: skip
    if not args.quiet:
        print(f"saved {args.output}")


def test_script(network):
    """Test a checkpoint of the network of that name as the command line says; the body of test-*.py."""
    script = f"test-{network}.py"
    parser = Parser(
        prog=script,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Test a {network} checkpoint on clean images and under attack, with 95 % Wilson intervals.",
        epilog=f"""examples:
  python {script} --data-dir data --attack fgsm --epsilon 0.02 8/255 --json out.json
  python {script} --dataset digits --epsilon 0.1 --source models/cnn-digits.safetensors""",
    )
    add_common_arguments(parser)
    option = parser.add_argument
    option(
        "--checkpoint", type=Path, metavar="FILE",
        help=f"the network to test (default {default_checkpoint(network, 'cifar10')}, "
        f"for digits {default_checkpoint(network, 'digits')})",
    )  # fmt: skip
    option("--attack", nargs="+", choices=["fgsm"], default=["fgsm"], help="attacks to run (default fgsm)")
    option(
        "--epsilon", nargs="+", type=epsilon, default=PAPER_EPSILONS, metavar="E",
        help="L-infinity radii in pixel units, such as 0.02 or 8/255 (default: the study's, 0.02 to 0.1)",
    )  # fmt: skip
    option(
        "--source", type=Path, metavar="CHECKPOINT",
        help="craft the examples on this checkpoint's gradient and transfer them (default: on the tested network's "
        "own, white-box)",
    )  # fmt: skip
    option("--split", choices=SPLITS, default="test", help="the images to test on (default test)")
    option("--examples", type=positive_int, metavar="N", help="test on the first N images alone (default all)")
    option("--batch-size", type=positive_int, default=250, help="images at once (default 250)")
    option("--json", type=Path, metavar="FILE", help="write the figures to this file")
    option("--figures", type=Path, metavar="FOLDER", help="draw accuracy.png and examples.png into this folder")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or default_checkpoint(network, args.dataset or "cifar10")
    run(parser, lambda: test_command(network, args))


def test_command(network_name, args):
    for path in (args.json, args.figures and args.figures / "accuracy.png"):
        if path:
            check_writable(path)

    from utils.checkpoints import load_checkpoint, read_metadata, write_atomically
    from utils.data import load_split
    from utils.evaluation import evaluate_fgsm, multiply_adds

    import torch  # isort: skip

    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    metadata = read_metadata(args.checkpoint)
    dataset = args.dataset or metadata.get("dataset")
    if metadata["network"] != network_name:
        raise UserError(f"{args.checkpoint} holds a {metadata['network']}: use test-{metadata['network']}.py")
    for path in filter(None, (args.checkpoint, args.source)):
        if read_metadata(path).get("dataset") != dataset:
            raise UserError(f"{path} was trained on {read_metadata(path).get('dataset')}, not on {dataset}")
    network = load_checkpoint(args.checkpoint, device)
    source = load_checkpoint(args.source, device) if args.source else None
    split = load_split(dataset, args.split, args.data_dir).first(args.examples).to(device)

    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{args.checkpoint}: {network_name}, width {network.arguments['width']}, {parameters:,} parameters, "
        f"{multiply_adds(network):,} multiply-adds an image\n"
        f"{dataset} {args.split} split, {len(split):,} images, {device}"
    )
    clean, *attacked = evaluate_fgsm(
        network, split, args.epsilon, source=source, batch_size=args.batch_size, progress=True
    )
    report = {
        "checkpoint": str(args.checkpoint), "network": network_name, "dataset": dataset, "split": args.split,
        "examples": len(split), "clean_accuracy": clean.accuracy,
        "clean_confidence_interval": clean.confidence_interval,
        "attacks": [
            {
                "name": "fgsm", "setting": "transfer" if args.source else "white_box",
                "source": str(args.source) if args.source else None, "epsilon": result.epsilon,
                "accuracy": result.accuracy, "confidence_interval": result.confidence_interval,
                "seconds": round(result.seconds, 3),
            }
            for result in attacked
        ],
    }  # fmt: skip
    print_table(clean, report["attacks"])
    if args.json:
        write_atomically(args.json, (json.dumps(report, indent=2) + "\n").encode())
    if args.figures:
        from utils import plotting

        plotting.save(plotting.accuracy_against_epsilon(report), args.figures / "accuracy.png")
        broken = [result.epsilon for result in attacked if result.accuracy < 0.5]
        shown = min(broken, default=max(args.epsilon))  # the smallest radius that fools the network more often than not
        plotting.save(
            plotting.adversarial_examples(network, split, shown, source=source), args.figures / "examples.png"
        )


def print_table(clean, attacks):
    rows = [("clean", "", 0, clean.accuracy, clean.confidence_interval, clean.seconds)]
    rows += [
        (a["name"], a["setting"], a["epsilon"], a["accuracy"], a["confidence_interval"], a["seconds"]) for a in attacks
    ]
    print(f"\n{'attack':8}{'setting':11}{'epsilon':>8}{'accuracy':>10}{'95 % interval':>17}{'seconds':>9}")
    for name, setting, radius, accuracy, (low, high), seconds in rows:
        interval = f"{low:.2%} - {high:.2%}"
        print(f"{name:8}{setting:11}{radius:8.4f}{accuracy:10.2%}{interval:>17}{seconds:9.1f}")


def add_common_arguments(parser):
    option = parser.add_argument
    option("--dataset", choices=DATASETS, help="default cifar10; digits needs no download")
    option(
        "--data-dir", type=Path, metavar="FOLDER",
        help="holds the data sets, downloaded into it on first use (default $DATA_DIR, else data)",
    )  # fmt: skip
    option(
        "--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="default auto: the first there is of cuda, mps, cpu",
    )  # fmt: skip
    option("--seed", type=int, default=0, help="of all random numbers (default 0)")


def default_checkpoint(network, dataset):
    return Path("models") / (f"{network}.safetensors" if dataset == "cifar10" else f"{network}-{dataset}.safetensors")


def epsilon(text):
    """An L-infinity radius: a decimal number or a fraction such as 8/255, at least 0."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number and no fraction such as 8/255") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative, and a radius is not")
    return value


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def width(text):
    value = positive_int(text)
    if value > LARGEST_WIDTH:
        raise argparse.ArgumentTypeError(f"{text} is above {LARGEST_WIDTH}")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def pick_device(name):
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


def check_writable(path):
    """Raise UserError unless a file can be made at `path`; its folder is made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        probe = path.with_name(f".{path.name}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def run(parser, command, hint=""):
    """Run a command; one line on stderr and status 2 for what the user can mend, 1 for a failing disk."""
    try:
        command()
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted{hint}\n")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
