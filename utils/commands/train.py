"""The command line of train-*.py: train one network, with or without a defence.

The flags of a recipe are made from the fields of utils.recipes.Recipe that have a description.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from utils.commands import checkpoints, types
from utils.commands.parser import Parser, check_writable, pick_device, run
from utils.constants import DATASETS, DEFENSE_LOSSES, RADIUS, UserError
from utils.files import resolved
from utils.quoting import printable
from utils.recipes import RECIPES, Recipe
from utils.tables import epsilon_text

if TYPE_CHECKING:
    import torch

    from utils.adversarial_sets import AugmentedSplit
    from utils.data import Split

SIZE = 32  # pixels, the width and height of the images that the networks take
# Defences that are losses, by their names in defenses.losses.DEFENSES.
ONLINE = ("fgsm", "n-fgsm", "n-pgd", "pgd", "trades")
DEFENSES_OF_FLAG: dict[str, tuple[str, ...]] = {"epsilon": ("fgsm-augment", *ONLINE), "source": ("fgsm-augment",)}
DEFENSES_OF_FLAG |= {"steps": ("n-pgd", "pgd", "trades"), "beta": ("trades",), "crafting": ONLINE}
DEFENSES_OF_FLAG |= dict.fromkeys(("loss", "smoothing"), ("fgsm", "n-fgsm", "n-pgd", "pgd"))


def train_script(network: str) -> None:
    """Train a network as the command line says: the body of train-*.py. network: a key of networks.NETWORKS."""
    parser = train_parser(network)
    args = parser.parse_args()
    for flag, defenses in DEFENSES_OF_FLAG.items():
        if getattr(args, flag) is not None and args.defense not in defenses:
            parser.error(f"--{flag} belongs to --defense {' or '.join(defenses)}")
    if args.classes and not args.data:
        parser.error("--classes belongs to --data")
    if args.data:  # a folder called "digits" does not hold the digits
        name = printable(resolved(args.data).stem)
        args.dataset = f"{name}-images" if name in DATASETS else name
    if args.epsilon == 0:
        parser.error("--epsilon 0 changes no image")
    if args.defense == "fgsm-augment" and not args.epsilon:
        parser.error("--defense fgsm-augment needs --epsilon")
    if args.defense in ONLINE:
        args.epsilon = args.epsilon or RADIUS
    args.source = args.source or checkpoints.default_baseline(network, args.dataset)
    args.output = args.output or checkpoints.default_output(network, args.dataset, args.epsilon, args.defense)
    if args.output.suffix != ".safetensors":
        parser.error(f"--output {args.output}: the name of a checkpoint ends in .safetensors")
    asked = {name: value for name, _, _ in flags_of_recipe() if (value := getattr(args, name)) is not None}
    recipe = msgspec.structs.replace(RECIPES[args.recipe], **asked)
    recipe = recipe if args.defense == "none" else recipe.with_defense()
    run(parser, lambda: train_command(network, args, recipe), output=args.output, batch_size=recipe.batch_size)


def train_parser(network: str) -> Parser:
    """The parser of train-*.py."""
    parser = Parser(
        f"train-{network}.py",
        f"Train the {network} network and save it as a safetensors checkpoint.",
        ["--dataset digits", f"--init models/{network}.safetensors --defense n-fgsm --epochs 10"],
    )
    parser.add_training_flags()
    add = partial(parser.add, "data")
    add("--data", types.file_path, "your images instead: PATH/CLASS/*.png, or an .npz")
    add("--classes", str, "classes of --data in order, or a file of them", nargs="+")
    parser.add("network", "--init", types.file_path, "start from the weights of this checkpoint")
    add_recipe_flags(parser)
    add_defense_flags(parser, network)
    text = "the checkpoint (default: in runs/, with a fitting name)"
    parser.add("output", "--output", types.file_path, text)
    option = parser.groups["output"].add_mutually_exclusive_group().add_argument
    option("--overwrite", action="store_true", help="replace an existing output when the training is done")
    option("--resume", action="store_true", help="continue an interrupted run; give the same flags")
    return parser


def flags_of_recipe() -> Iterator[tuple[str, Any, str]]:
    """Name, type and description of each field of Recipe that has a flag."""
    for field in msgspec.structs.fields(Recipe):
        for meta in getattr(field.type, "__metadata__", ()):
            if meta.description:
                yield field.name, field.type, meta.description


def add_recipe_flags(parser: Parser) -> None:
    """Add --recipe, a flag for each number of a recipe, and a table of all recipes' numbers."""
    columns: dict[str, list[str]] = {"recipe": [*RECIPES], "optimizer": [r.optimizer for r in RECIPES.values()]}
    text = "from the table (default one-cycle): paper is the study's"
    parser.add("training", "--recipe", tuple(RECIPES), text, default="one-cycle")
    for name, annotation, text in flags_of_recipe():
        flag = name.replace("_", "-")
        columns[flag] = [f"{getattr(recipe, name):g}" for recipe in RECIPES.values()]
        if len({*columns[flag]}) == 1:
            text += f" (default {columns.pop(flag)[0]})"
        parser.add("training", f"--{flag}", types.number(annotation), text)
    rows = [columns, *zip(*columns.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    parser.groups["training"].description = "\n".join(["A flag replaces the number of a recipe:", *lines])
    parser.add("training", "--seed", types.seed, "of weights, shuffling and augmentation (default 0)", default=0)


def add_defense_flags(parser: Parser, network: str) -> None:
    """Add --defense and the options of the defences."""
    add = partial(parser.add, "defence")
    text = "none (default), fgsm, n-fgsm, n-pgd, pgd, trades, or fgsm-augment (on examples of --source)"
    names = ("none", "fgsm-augment", *ONLINE)
    add("--defense", names, text, default="none")
    add("--defence", names, SUPPRESS, default=SUPPRESS, dest="defense")
    add("--epsilon", types.epsilon, "L-infinity radius (default 8/255; not of fgsm-augment)")
    add("--steps", types.positive_int, "of the attack in n-pgd (default 2), pgd and trades (7)")
    add("--beta", types.positive_float, "weight of the robust term in trades (default 6)")
    add("--loss", DEFENSE_LOSSES, "examples raise cross_entropy (default), margin, sampled")
    add("--smoothing", types.smoothing, "part of a label that all classes share (default 0)")
    add("--crafting", ("training", "evaluation"), "batch norm's mode: training (default) or evaluation")
    add("--source", types.file_path, "crafts the examples of fgsm-augment (default: baseline)")


def train_command(network: str, args: Namespace, recipe: Recipe) -> None:
    """Prepare and train. On Ctrl-C, say how to continue if an epoch was saved."""
    from utils.distributed import from_main, process_group
    from utils.runs import Interrupted
    from utils.training import train

    with process_group():
        device = pick_device(args.device)
        prepared = from_main(lambda: prepare_training(network, args, recipe, device))
        if prepared is None:
            return
        training, validation, defense = prepared
        settings = {
            name: getattr(args, name) for name in ("output", "width", "seed", "init", "precision", "resume", "quiet")
        }
        try:
            train(network, training, validation, recipe, defense=defense, device=device, **settings)
        except Interrupted as interrupt:
            flag = "--resume in place of --overwrite" if args.overwrite else "--resume"
            hint = f"; {flag}, with the same flags, continues after them" if interrupt.saved_epochs else ""
            raise KeyboardInterrupt(f"{interrupt}{hint}") from None
        if not args.quiet:
            print(f"saved {args.output}")


def prepare_training(
    network: str, args: Namespace, recipe: Recipe, device: torch.device
) -> tuple[Split | AugmentedSplit, Split, Any] | None:
    """The training split, the validation split and the defence; None if the output is finished already.

    Raises UserError for everything that may be missing or damaged.
    """
    from defenses.losses import DEFENSES
    from utils.adversarial_sets import AugmentedSplit, adversarial_set
    from utils.checkpoints import file_digest
    from utils.data import load_split

    augmented = args.defense == "fgsm-augment"
    check_files(network, args)
    if args.data:
        clean, validation = own_splits(args)
    else:
        clean, validation = (load_split(args.dataset, name, args.data_dir) for name in ("train", "validation"))
    training: Any = clean
    defense = None
    if augmented:  # the examples follow below, where they are needed
        training = AugmentedSplit(clean, None, args.epsilon, file_digest(args.source))  # type: ignore[arg-type]
    elif args.defense != "none":
        asked = {name: getattr(args, name) for name in ("epsilon", "steps", "beta", "loss", "smoothing", "crafting")}
        defense = DEFENSES[args.defense](**{name: value for name, value in asked.items() if value is not None})
    if is_finished(network, args, recipe, training, defense):
        if not args.quiet:
            print(f"{args.output} is finished: there is nothing to resume")
        return None
    if augmented:
        signs = adversarial_set(args.source, clean, device=device, progress=not args.quiet)
        training = replace(training, direction=signs.direction)
    if not args.quiet:
        if args.recipe == "robust" and not defense:
            text = f"note: with --defense {args.defense}, the recipe robust trains a network that is not robust"
            print(text, file=sys.stderr)
        defended = f", {args.defense} at {epsilon_text(args.epsilon)}" if args.epsilon else ""
        data = f"{len(training):,} {args.dataset} images"
        print(f"training {network}, width {args.width}, on {data}{defended}, {device}", flush=True)
    return training, validation, defense


def own_splits(args: Namespace) -> tuple[Split, Split]:
    """The user's images in colour, 32 x 32 pixels, 8 bits: those to train on, and every tenth, on which to validate."""
    import torch

    from utils.commands.model import read_classes
    from utils.images import read_images

    classes = read_classes(args.classes) if args.classes else None
    first = read_images(args.data, examples=1, classes=classes).images
    if first.shape[2:] != (SIZE, SIZE) and not args.quiet:
        print(f"{args.data}: images are scaled and cropped to {SIZE} x {SIZE} pixels")
    split = read_images(args.data, resize=SIZE, classes=classes)
    if len(split) < 10:
        raise UserError(f"{args.data} has {len(split)} images, but a training needs 10, because a tenth validates")
    if len(split.class_names) < 2:
        raise UserError(f"{args.data} has one class, but a network learns to tell two or more apart")
    images = (255 * split.images).round().to(torch.uint8) if split.images.is_floating_point() else split.images
    images = images.expand(-1, 3, -1, -1)
    split = replace(split, dataset=args.dataset, images=images, memory_format=torch.channels_last)
    validates = torch.arange(len(split)) % 10 == 9
    chosen = {"train": ~validates, "validation": validates}
    training, validation = (
        replace(split, name=name, images=split.images[index], labels=split.labels[index])
        for name, index in chosen.items()
    )
    if not all(training.channel_statistics()[1]):
        raise UserError(f"{args.data}: in a channel, all pixels of all training images are the same")
    return training, validation


def check_files(network: str, args: Namespace) -> None:
    """Raise UserError if the output exists and may not be replaced, or a file cannot be written or read."""
    from utils.adversarial_sets import FOLDER
    from utils.checkpoints import read_metadata
    from utils.runs import PartialRun

    partial = PartialRun(args.output)
    if checkpoints.is_shipped(args.output) and not (args.overwrite or (args.resume and partial.exists())):
        raise UserError(
            f"{args.output} is among the shipped files: choose another --output, such as runs/{args.output.name}"
        )
    existing = [path for path in (partial.state, partial.output, partial.log) if path.exists()]
    if existing and not (args.overwrite or args.resume):
        if partial.exists():
            raise UserError(f"{partial.state} is an interrupted run: --resume continues it, --overwrite starts again")
        raise UserError(f"{existing[0]} exists: --output chooses another file, --overwrite replaces this one")
    check_writable(args.output)
    partial.check_own()
    if args.init:
        read_metadata(args.init)  # before a data set is downloaded
    if args.defense == "fgsm-augment":
        checkpoints.check_is_made(args.source, network)
        read_metadata(args.source)  # before a data set is downloaded
        if resolved(args.source) == resolved(args.output):
            raise UserError(f"--output {args.output} is the --source, and would replace it")
        check_writable(FOLDER / "set")


def is_finished(network: str, args: Namespace, recipe: Recipe, training: Split | AugmentedSplit, defense: Any) -> bool:
    """Whether --resume finds the finished network. Raises UserError if it was trained with other arguments."""
    from utils.checkpoints import read_metadata
    from utils.runs import PartialRun, check_same_arguments, training_arguments

    if not args.resume or not args.output.exists() or PartialRun(args.output).exists():
        return False
    asked = {"width": args.width, "seed": args.seed, "init": args.init}
    wanted = training_arguments(network, training, recipe, defense=defense, **asked)
    check_same_arguments(args.output, read_metadata(args.output).training, wanted)
    return True
