"""The study from the command line: `python -m study`, `python -m study robustness` and `python -m study demo`."""

import utils.commands.interrupts  # noqa: F401, because it comes first

# isort: split
import sys
from argparse import Namespace
from pathlib import Path

from study.paper import TRAINING_EPSILONS
from utils.commands import types
from utils.commands.checkpoints import is_shipped, load_network
from utils.commands.parser import Parser, check_writable, pick_device, run
from utils.constants import ARCHITECTURES, DATASETS, TITLES

DIGITS = Path("results/digits")  # the folder for everything that the study writes on digits


def main() -> None:
    """Run the command that the first argument names; without one, the study itself."""
    script = {"robustness": robustness_script, "demo": demo_script}.get("".join(sys.argv[1:2]), study_script)
    if script is not study_script:
        del sys.argv[1]
    script()


def study_script() -> None:
    """Do the study, or the rest of it, as the command line says."""
    parser = Parser(
        "python -m study",
        "Do the whole study for both networks: train the baselines, retrain each one on its FGSM examples at four "
        "radii, test all of them under transferred and white-box FGSM, and repeat the study's own recipe and three "
        "seeds. Finished parts are skipped, and an interrupted part continues.",
        ["--data-dir data", "--dataset digits"],
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["robustness", "demo"],
        help="robustness: test the networks under every attack instead; demo: tell the study's story in two minutes, "
        "on digits; python -m study robustness --help and python -m study demo --help explain their flags",
    )
    parser.add_training_flags()
    parser.add(
        "training",
        "--epochs",
        types.positive_int,
        "passes over the images in every training (default: those of each recipe)",
    )
    text = f"the ten networks of the tables; an existing baseline stays as it is (default models, for digits {DIGITS})"
    parser.add("output", "--models", types.file_path, text)
    text = f"the networks of the study's own recipe and of the seeds (default runs/study, for digits {DIGITS})"
    parser.add("output", "--scratch", types.file_path, text)
    text = f"study.json, tables.md and, in study/, the figures (default results, for digits {DIGITS})"
    parser.add("output", "--results", types.file_path, text)
    text = "train again if a checkpoint is damaged or was trained with other arguments; existing baselines are kept"
    parser.add_switch("--overwrite", text)
    args = parser.parse_args()
    if args.command:
        parser.error(f"{args.command} comes before the flags: python -m study {args.command} ...")
    set_default_folders(parser, args, "models", "results")
    args.scratch = args.scratch or (DIGITS if args.dataset == "digits" else Path("runs/study"))
    parser.refuse_many_processes()
    run(parser, lambda: study_command(args), output=args.results / "study.json")


def set_default_folders(parser: Parser, args: Namespace, *written: str) -> None:
    """Set --models and --results where the user gave none; end the process if --overwrite might replace shipped files.

    written: the folders among these two that the command writes to.
    """
    for name in ("models", "results"):
        if getattr(args, name) is None:
            folder = DIGITS if args.dataset == "digits" else Path(name)
            if args.overwrite and name in written and is_shipped(folder):
                parser.error(f"--overwrite could replace shipped files: say with --{name} in which folder it may")
            setattr(args, name, folder)


def study_command(args: Namespace) -> None:
    """Do what remains of the study, then write the tables and draw the figures."""
    for folder in (args.models, args.scratch, args.results, args.results / "study"):
        check_writable(folder / "study.json")

    from study import figures, tables
    from study.formats import read_whole_study
    from study.runner import Study
    from utils import plotting
    from utils.adversarial_sets import FOLDER
    from utils.files import write_atomically

    check_writable(FOLDER / "set")
    path = args.results / "study.json"
    study = Study(
        args.dataset,
        models=args.models,
        scratch=args.scratch,
        report=path,
        data_dir=args.data_dir,
        width=args.width,
        epochs=args.epochs,
        device=str(pick_device(args.device)),
        precision=args.precision,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    if not (study.todo or args.quiet):
        print("every network is trained and tested: only the tables and figures are made again")
    study.run()
    report = read_whole_study(path)
    write_atomically(args.results / "tables.md", tables.document(report).encode())
    for name, figure in figures.study_figures(report).items():
        plotting.save(figure, args.results / "study" / f"{name}.png")
    for name in ARCHITECTURES:
        baseline, retrained, split = study.pair(name)
        title = f"{TITLES[name]} baseline, and retrained on its examples at {max(TRAINING_EPSILONS):g}"
        figure = figures.side_by_side(baseline, retrained, split, 0.1, title)
        plotting.save(figure, args.results / "study" / f"{name}-side-by-side.png")
    if not args.quiet:
        print(tables.summary(report))
        print(f"\nsee {args.results / 'tables.md'} and the figures in {args.results / 'study'}")


def robustness_script() -> None:
    """Test the networks under every attack, as the command line says."""
    parser = Parser(
        "python -m study robustness",
        "Test the baselines, the networks retrained on 0.2, the robust networks and undefended ones of the same "
        "width under every attack, from transferred FGSM to AutoAttack. Finished tests are skipped, "
        "and an interrupted test continues.",
        ["--data-dir data", "--examples 100 --results runs/robustness"],
    )
    parser.add_switch("--quiet", "print only errors")
    parser.add("data", "--dataset", DATASETS, "the data set to test on: cifar10 (default) or digits", default="cifar10")
    text = "attack the first N test images with PGD and AutoAttack (default 1000), the next N with AutoAttack, "
    text += "ten times as many with the strong attack, and all with FGSM"
    parser.add("data", "--examples", types.positive_int, text, default=1000)
    text = f"the networks (default models, for digits {DIGITS})"
    parser.add("network", "--models", types.file_path, text)
    text = "robustness.json, robustness.md and, in robustness/, the figures, some of which show the logs in defenses/, "
    text += f"candidates/, overfitting/, tried/ and validation/ (default results, for digits {DIGITS})"
    parser.add("output", "--results", types.file_path, text)
    text = "replace results of other checkpoints, versions or numbers of images in the report"
    parser.add_switch("--overwrite", text)
    args = parser.parse_args()
    set_default_folders(parser, args, "results")
    parser.refuse_many_processes()
    run(parser, lambda: robustness_command(args), output=args.results / "robustness.json")


def robustness_command(args: Namespace) -> None:
    """Do the tests that remain, then write the tables and draw the figures."""
    for folder in (args.results, args.results / "robustness"):
        check_writable(folder / "robustness.json")

    from study import figures, tables
    from study.robustness import checkpoint_paths, measure, training_logs
    from utils import plotting
    from utils.allocator import keep_freed_memory
    from utils.data import load_split
    from utils.files import write_atomically

    keep_freed_memory()
    split = load_split(args.dataset, "test", args.data_dir).to(pick_device(args.device))
    networks = {path: load_network(path, split, name).to(split.device) for name, path in checkpoint_paths(args.models)}
    logs = training_logs(args.models, args.results)  # a mistake in them is found before hours of attacks
    path = args.results / "robustness.json"
    report = measure(networks, split, path, examples=args.examples, overwrite=args.overwrite, quiet=args.quiet)
    write_atomically(args.results / "robustness.md", tables.robustness_document(report, logs).encode())
    by_name = {path.stem: network for path, network in networks.items()}
    for name, figure in figures.robustness_figures(report, logs, by_name, split).items():
        plotting.save(figure, args.results / "robustness" / f"{name}.png")
    if not args.quiet:
        print(f"\nsee {args.results / 'robustness.md'} and the figures in {args.results / 'robustness'}")


def demo_script() -> None:
    """Tell the study's story on digits, as the command line says."""
    parser = Parser(
        "python -m study demo",
        "Tell the study's story in two minutes, on scikit-learn's digits: a CNN, an attack that breaks it, the "
        "study's defence, an attack that breaks that too, and adversarial training. Finished parts are skipped.",
        ["--results runs/demo"],
    )
    text = "passes over the images in every training (default: as many as the story needs)"
    parser.add("training", "--epochs", types.positive_int, text)
    text = "the three networks and demo.png (default results/demo)"
    parser.add("output", "--results", types.file_path, text, default=Path("results/demo"))
    args = parser.parse_args()
    parser.refuse_many_processes()
    run(parser, lambda: demo_command(args), output=args.results / "demo.png")


def demo_command(args: Namespace) -> None:
    """Train, attack, and show what came out."""
    check_writable(args.results / "demo.png")

    from study.demo import Demo

    Demo(args.results, epochs=args.epochs, device=str(pick_device(args.device))).tell()


if __name__ == "__main__":
    main()
