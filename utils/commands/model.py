"""The command line of test-model.py: anyone's network on anyone's images."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from utils.commands import checkpoints, types
from utils.commands.parser import Parser, pick_device, run
from utils.commands.test import (
    Prepared,
    add_test_flags,
    attack_and_report,
    check_attack_flags,
    check_outputs,
    first_output,
    folder_of,
    keeping,
    move,
    write_report,
)
from utils.constants import DATASETS, LARGEST_CLASSES, UserError
from utils.files import resolved
from utils.quoting import one_line

if TYPE_CHECKING:
    from utils.data import Split

LONGEST_LIST = 2**20  # bytes of a file with the names of classes


def model_script() -> None:
    """Test a network as the command line says: the body of test-model.py."""
    parser = model_parser()
    args = parser.parse_args()
    check_attack_flags(parser, args)
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std belong together")
    if str(args.data) in DATASETS and (args.resize or args.classes):
        parser.error(f"--resize and --classes are for your own images, not for {args.data}")
    if str(args.data) not in DATASETS and args.split != "test":
        parser.error(f"--split belongs to --data {' and '.join(DATASETS)}: your own images have no splits")
    if args.channels != "3" and not args.data.is_dir():
        parser.error("--channels is for a folder of pictures")
    if args.save:
        check_save_flags(parser, args)
    parser.refuse_many_processes()
    run(parser, lambda: model_command(args), output=first_output(args), batch_size=args.batch_size)


def check_save_flags(parser: Parser, args: Namespace) -> None:
    """End the process with an error if the folder of --save would hold other files, or two results in one folder."""
    folders = [folder_of(attack, radius) for attack in args.attack for radius in args.epsilon or [args.default_radius]]
    if len(set(folders)) < len(folders):
        parser.error("--save needs attacks and radii that differ, in the first four digits: each has its own folder")
    for path in filter(None, (args.json, args.figures)):
        if resolved(path).is_relative_to(resolved(args.save)):
            parser.error(f"--save {args.save} needs a folder of its own, but {path} is in it")


def model_parser() -> Parser:
    """The parser of test-model.py."""
    parser = Parser(
        "test-model.py",
        "Test your own network on your own images, clean and under attack. --model names your code, which is executed; "
        "the files of --weights and --data are only read.",
        [
            "--model models/cnn-robust.safetensors --data cifar10 --attack pgd --examples 100 --save runs/adversarial",
            "--model resnet18 --data cifar10 --examples 20",
        ],
    )
    add = partial(parser.add, "data")
    text = "a folder with a folder of pictures for each class, an .npz with images and labels, cifar10 or digits"
    add("--data", types.file_path, text, required=True)
    add("--classes", str, "the network's classes in its order, or a file with one name on each line", nargs="+")
    add("--resize", types.positive_int, "scale and crop pictures to N x N pixels")
    add("--channels", ("1", "3"), "of a folder's pictures: 3 (default), or 1, grey", default="3")
    add = partial(parser.add, "network")
    text = (
        "module:name or file.py:name of an nn.Module or a function that makes one, a torchvision name or a checkpoint"
    )
    add("--model", str, text, required=True)
    add("--weights", types.file_path, "a state dict, .safetensors or .pth (default: none)")
    number = types.number(Annotated[float, Meta(ge=-1e9, le=1e9)])
    add("--mean", number, "the mean to subtract from each channel", nargs="+")
    add("--std", types.positive_float, "the deviation to divide each channel by", nargs="+")
    add_test_flags(parser)
    parser.add("output", "--save", types.file_path, "save the adversarial examples as PNGs into this folder")
    return parser


def model_command(args: Namespace) -> None:
    """Load, attack, print, and write the report, the figures and the examples."""
    device = pick_device(args.device)
    subject, classes = prepare_model(args)
    move(subject, device)
    parameters = sum(parameter.numel() for parameter in subject.network.parameters())
    name = one_line(args.model) + (f" with {args.weights}" if args.weights else "")
    weights = "" if args.checkpoint or ":" in args.model else "random weights, "
    print(f"{name}: {weights}{parameters:,} parameters, {classes:,} classes")
    split = subject.split
    size = "x".join(map(str, split.images.shape[1:]))
    print(f"{split.dataset} {split.name} split, {len(split):,} images of {size}, {device}")
    about = {"checkpoint": str(args.weights or args.model), "network": one_line(args.model)[:200], "classes": classes}
    with keeping(subject):
        write_report(attack_and_report(subject, args, about), subject, args)


def prepare_model(args: Namespace) -> tuple[Prepared, int]:
    """Load everything onto the CPU: the subject and the number of its network's classes.

    Raises UserError for whatever is missing, damaged or does not fit, before hours of attacks.
    """
    import torch

    from attacks.autoattack import FEWEST_CLASSES
    from utils.checkpoints import LONGEST_WEIGHTS, file_digest, load_checkpoint, read_metadata
    from utils.images import as_split
    from utils.models import count_classes, load_model
    from utils.notes import notes_beside
    from utils.saving import check_empty

    check_outputs(args)
    if args.save:
        check_empty(args.save)
    names = read_classes(args.classes) if args.classes else None
    if args.model.endswith(".safetensors") and not names and str(args.data) not in DATASETS:
        names = read_metadata(args.model).class_names  # of a checkpoint of this project
    args.checkpoint = args.weights or (Path(args.model) if args.model.endswith(".safetensors") else None)
    # Before the network is loaded; `write_report` compares it afterwards.
    sha256 = file_digest(args.checkpoint, longest=LONGEST_WEIGHTS) if args.checkpoint else None
    torch.manual_seed(args.seed)  # of weights that are random
    options = {"mean": args.mean, "std": args.std, "num_classes": len(names) if names else None}
    network = load_model(args.model, weights=args.weights, **options).float()
    whole = as_split(read_data(args, names), network)
    classes = count_classes(network, whole)
    if classes < FEWEST_CLASSES and "autoattack" in args.attack:
        raise UserError(f"AutoAttack needs a network with {FEWEST_CLASSES} classes; this one has {classes}")
    whole = named(whole, classes, args)
    split = whole.first(args.examples)
    source_path = args.source
    if args.diagnose and not args.source and split.dataset in DATASETS:
        baseline = checkpoints.default_baseline("cnn", split.dataset)
        source_path = baseline if baseline.exists() else None
    output = first_output(args)
    source = load_checkpoint(source_path) if source_path else None
    if source and count_classes(source, split) != classes:
        raise UserError(f"{source_path} has another number of classes than --model")
    return (
        Prepared(
            sha256=sha256,
            split=split,
            network=network,
            source=source if args.source else None,
            diagnosis_path=source_path,
            diagnosis_source=source,
            notes=notes_beside(output) if output else None,
            save=args.save,
            whole=whole,
        ),
        classes,
    )


def read_data(args: Namespace, names: list[str] | None) -> Split:
    """The images that --data names; of a built-in data set all, of a folder or a file at most --examples."""
    from utils.data import load_split
    from utils.images import read_images

    if str(args.data) in DATASETS:
        return load_split(str(args.data), args.split, args.data_dir)
    options = {"examples": args.examples, "resize": args.resize, "channels": int(args.channels)}
    return read_images(args.data, classes=names, **options)


def read_classes(values: list[str]) -> list[str]:
    """The names of --classes: the values themselves, or the lines of a file if there is one of that name."""
    from utils.files import read_bytes

    if len(values) == 1 and Path(values[0]).exists():
        try:
            text = read_bytes(values[0], LONGEST_LIST).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"--classes {values[0]} cannot be read: {one_line(error)}") from None
        values = [line.strip() for line in text.splitlines() if line.strip()]
    if len(set(values)) < len(values) or not 1 <= len(values) <= LARGEST_CLASSES:
        raise UserError(f"--classes needs 1 to {LARGEST_CLASSES:,} names, each once")
    return values


def named(split: Split, classes: int, args: Namespace) -> Split:
    """The split with a name for each class of the network. Raises UserError if --classes names another number."""
    from dataclasses import replace

    from utils.images import with_numbers

    if args.classes and len(split.class_names) != classes:
        raise UserError(f"--classes has {len(split.class_names):,} names, but the network has {classes:,} classes")
    if args.data.is_dir() and len(split.class_names) < classes:
        first, count = split.class_names[0], len(split.class_names)
        print(
            f"{args.data} has {count} folders and the network {classes:,} classes: they are taken for its first "
            f"{count}, {one_line(first)} for class 0; --classes names them in the network's order"
        )
    return replace(split, class_names=with_numbers(split.class_names, classes))
