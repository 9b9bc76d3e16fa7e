"""TODO: utils.commands.train."""

from dataclasses import replace

import msgspec

from utils.commands.parser import (
    Parser,
    check_writable,
    contrast,
    default_checkpoint,
    default_checkpoints,
    file_path,
    fraction,
    pick_device,
    positive_float,
    positive_int,
    radius,
    run,
    seed,
    shift,
    weight_decay,
)
from utils.constants import UserError
from utils.recipes import RECIPES

ONLINE = ("fgsm", "n-fgsm", "pgd", "trades")  # the defences that are losses, utils.defenses.DEFENSES


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
    recipe = msgspec.structs.replace(
        RECIPES[args.recipe], **{name: value for name, value in replaced.items() if value is not None}
    )
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
    from defenses.losses import DEFENSES
    from utils.adversarial_sets import FOLDER, AugmentedSplit, adversarial_set
    from utils.checkpoints import file_digest, read_metadata
    from utils.data import load_split
    from utils.runs import PartialRun, check_same_arguments, training_arguments

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
