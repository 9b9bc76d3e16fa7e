"""The command line of train-*.py: train one network, with or without a defence.

The flags of a recipe are made from the fields of utils.recipes.Recipe that have a description.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from utils.commands import types
from utils.commands.checkpoints import default_checkpoint, default_checkpoints
from utils.commands.parser import Parser, check_writable, pick_device, run
from utils.constants import RADIUS, UserError
from utils.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    import torch

    from utils.adversarial_sets import AugmentedSplit
    from utils.data import Split

ONLINE = ("fgsm", "n-fgsm", "pgd", "trades")  # defences that are losses, by their names in defenses.losses.DEFENSES
DEFENSES_OF_FLAG = {
    "epsilon": ("fgsm-augment", *ONLINE),
    "source": ("fgsm-augment",),
    "steps": ("pgd", "trades"),
    "beta": ("trades",),
    "crafting": ONLINE,
}


def train_script(network: str) -> None:
    """Train a network as the command line says: the body of train-*.py. network: a key of networks.NETWORKS."""
    parser = train_parser(network)
    args = parser.parse_args()
    for flag, defenses in DEFENSES_OF_FLAG.items():
        if getattr(args, flag) is not None and args.defense not in defenses:
            parser.error(f"--{flag} belongs to --defense {' or '.join(defenses)}")
    if args.defense == "fgsm-augment" and not args.epsilon:
        parser.error("--defense fgsm-augment needs --epsilon")
    if args.defense in ONLINE:
        args.epsilon = args.epsilon or RADIUS
    args.source = args.source or default_checkpoint(network, args.dataset)
    args.output = args.output or default_checkpoint(network, args.dataset, args.epsilon, args.defense)
    if args.output.suffix != ".safetensors":
        parser.error(f"--output {args.output}: the name of a checkpoint ends in .safetensors")
    asked = {name: getattr(args, name) for name, _, _ in flags_of_recipe()}
    asked = {name: value for name, value in asked.items() if value is not None}
    recipe = msgspec.structs.replace(RECIPES[args.recipe], **asked)
    recipe = recipe if args.defense == "none" else recipe.with_defense()
    run(parser, lambda: train_command(network, args, recipe), output=args.output)


def train_parser(network: str) -> Parser:
    """The parser of train-*.py."""
    parser = Parser(
        f"train-{network}.py",
        f"Train the {network} network, with or without a defence, and save it as a safetensors checkpoint.",
        [
            f"--data-dir data --epochs 10 --output runs/{network}.safetensors",
            f"--defense fgsm-augment --epsilon 0.2 --output runs/{network}-fgsm-augment-0.2.safetensors",
        ],
    )
    parser.add_training_flags()
    add_recipe_flags(parser)
    add_defense_flags(parser, network)
    output = parser.add_argument_group("output")
    text = (
        f"the checkpoint to write, beside which its log ends in .jsonl ({default_checkpoints(network)}; the name and "
    )
    text += "epsilon of a defence are added)"
    output.add_argument("--output", type=types.file_path, metavar="FILE", help=text)
    option = output.add_mutually_exclusive_group().add_argument
    option("--overwrite", action="store_true", help="replace an existing output when the training is done")
    text = "continue an interrupted run after its last finished epoch, or start a new run; give the same flags as "
    text += "before. On the same CPU with as many threads, the result is bit-identical"
    option("--resume", action="store_true", help=text)
    return parser


def flags_of_recipe() -> Iterator[tuple[str, Any, str]]:
    """Name, type and description of each field of Recipe that has a flag."""
    for field in msgspec.structs.fields(Recipe):
        for meta in getattr(field.type, "__metadata__", ()):
            if meta.description:
                yield field.name, field.type, meta.description


def add_recipe_flags(parser: Parser) -> None:
    """Add --recipe, a flag for each number of a recipe, and a table of all recipes' numbers."""
    names = [name for name, _, _ in flags_of_recipe()]
    table = [["recipe", "optimizer", *(name.replace("_", "-") for name in names)]]
    for name, recipe in RECIPES.items():
        table.append([name, recipe.optimizer, *(f"{getattr(recipe, field):g}" for field in names)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    parser.training.description = "\n".join(
        ["A recipe is a set of numbers. Each number has a flag that replaces it:", "", *lines]
    )
    option = parser.training.add_argument
    text = "one-cycle (the default), long (the shipped baselines), retrain, retrain-sgd and retrain-large (for "
    text += "fgsm-augment at small radii, with the CNN at 0.005, and at radii such as 0.2), short (a first impression) "
    text += "or paper (the study's own)"
    option("--recipe", choices=RECIPES, default="one-cycle", help=text)
    for name, annotation, description in flags_of_recipe():
        option(f"--{name.replace('_', '-')}", type=types.number(annotation), metavar="X", help=description)
    text = "of the initial weights, shuffling and augmentation (default 0)"
    option("--seed", type=types.seed, default=0, help=text)


def add_defense_flags(parser: Parser, network: str) -> None:
    """Add --defense and the options of the defences."""
    option = parser.add_argument_group("defence").add_argument
    text = "none (the default) trains on clean images. fgsm-augment, the study's defence, adds an FGSM example of each "
    text += "image, crafted on a trained network. The others craft examples on the network itself in every step. A "
    text += "defence is trained without label smoothing"
    option("--defense", choices=["none", "fgsm-augment", *ONLINE], default="none", help=text)
    text = "L-infinity radius of the defence, such as 0.2 or 8/255 (default 8/255; fgsm-augment has no default)"
    option("--epsilon", type=types.training_epsilon, metavar="E", help=text)
    option("--steps", type=types.positive_int, help="steps of the attack in pgd and trades (default 7)")
    option("--beta", type=types.positive_float, help="weight of the robust term in trades (default 6)")
    text = "mode of batch norm while fgsm, n-fgsm, pgd and trades craft examples (default training)"
    option("--crafting", choices=("training", "evaluation"), help=text)
    text = f"the trained network on which fgsm-augment crafts ({default_checkpoints(network)})"
    option("--source", type=types.file_path, metavar="CHECKPOINT", help=text)


def train_command(network: str, args: Namespace, recipe: Recipe) -> None:
    """Prepare and train. On Ctrl-C, say how to continue if an epoch was saved."""
    from utils.distributed import from_main, joined
    from utils.runs import Interrupted
    from utils.training import train

    with joined():
        device = pick_device(args.device)
        prepared = from_main(lambda: prepare_training(network, args, recipe, device))
        if prepared is None:
            return
        training, validation, defense = prepared
        settings = {name: getattr(args, name) for name in ("output", "width", "seed", "precision", "resume", "quiet")}
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
    check_files(args)
    clean, validation = (load_split(args.dataset, name, args.data_dir) for name in ("train", "validation"))
    training: Any = clean
    defense = None
    if augmented:  # the examples follow below, where they are needed
        training = AugmentedSplit(clean, None, args.epsilon, file_digest(args.source))  # type: ignore[arg-type]
    elif args.defense != "none":
        asked = {name: getattr(args, name) for name in ("epsilon", "steps", "beta", "crafting")}
        defense = DEFENSES[args.defense](**{name: value for name, value in asked.items() if value is not None})
    if is_finished(network, args, recipe, training, defense):
        if not args.quiet:
            print(f"{args.output} is finished: there is nothing to resume")
        return None
    if augmented:
        signs = adversarial_set(args.source, clean, device=device, progress=not args.quiet)
        training = replace(training, direction=signs.direction)
    if not args.quiet:
        defended = f", {args.defense} at {args.epsilon:g}" if args.epsilon else ""
        data = f"{len(training):,} {args.dataset} images"
        print(f"training {network}, width {args.width}, on {data}{defended}, {device}", flush=True)
    return training, validation, defense


def check_files(args: Namespace) -> None:
    """Raise UserError if the output exists and may not be replaced, or a file cannot be written or read."""
    from utils.adversarial_sets import FOLDER
    from utils.checkpoints import read_metadata
    from utils.runs import PartialRun

    partial = PartialRun(args.output)
    existing = [path for path in (partial.state, partial.output, partial.log) if path.exists()]
    if existing and not (args.overwrite or args.resume):
        if partial.exists():
            raise UserError(f"{partial.state} is an interrupted run: --resume continues it, --overwrite starts again")
        raise UserError(f"{existing[0]} exists: --overwrite replaces it, --output chooses another file")
    check_writable(args.output)
    if args.defense == "fgsm-augment":
        read_metadata(args.source)  # before a data set is downloaded
        if args.source.resolve() == args.output.resolve():
            raise UserError(f"--output {args.output} is the --source, and would replace it")
        check_writable(FOLDER / "set")


def is_finished(network: str, args: Namespace, recipe: Recipe, training: Split | AugmentedSplit, defense: Any) -> bool:
    """Whether --resume finds the finished network. Raises UserError if it was trained with other arguments."""
    from utils.checkpoints import read_metadata
    from utils.runs import PartialRun, check_same_arguments, training_arguments

    if not args.resume or not args.output.exists() or PartialRun(args.output).exists():
        return False
    wanted = training_arguments(network, training, recipe, width=args.width, seed=args.seed, defense=defense)
    check_same_arguments(args.output, read_metadata(args.output).training, wanted)
    return True
