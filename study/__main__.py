"""The study from the command line: `python -m study`, and `python -m study robustness`."""

import sys
from pathlib import Path

from study.paper import TRAINING_EPSILONS
from utils.commands.parser import Parser, check_writable, file_path, load_network, pick_device, positive_int, run
from utils.constants import DATASETS, TITLES

DEMO = Path("results/demo")  # all that the study writes on digits, for which nobody waits long


def study_script():
    """Do the whole study, or what remains of it, as the command line says; `python -m study`."""
    parser = Parser(
        "-m study",
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

    from study import figures, tables
    from study.runner import Study
    from utils import plotting
    from utils.adversarial_sets import FOLDER
    from utils.files import write_atomically

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
    for name, figure in figures.study_figures(report).items():
        plotting.save(figure, args.results / "study" / f"{name}.png")
    for name in tables.networks(report):
        baseline, retrained, split = study.pair(name)
        title = f"{TITLES[name]} baseline, and retrained on its examples at {max(TRAINING_EPSILONS):g}"
        figure = plotting.side_by_side(baseline, retrained, split, 0.1, title)
        plotting.save(figure, args.results / "study" / f"{name}-side-by-side.png")
    if not args.quiet:
        print(tables.summary(report))
        print(f"\nsee {args.results / 'tables.md'} and the figures in {args.results / 'study'}")


def robustness_script():
    """`python -m study robustness`: baselines, the study's defence and the robust networks under every attack."""
    parser = Parser(
        "-m study robustness",
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

    from study import figures, tables
    from study.robustness import checkpoint_paths, measure, training_logs
    from utils import plotting
    from utils.allocator import keep_freed_memory
    from utils.data import load_split
    from utils.files import write_atomically

    keep_freed_memory()
    split = load_split(args.dataset, "test", args.data_dir).to(pick_device(args.device))
    networks = {
        path: (name, load_network(path, split, name).to(split.device)) for name, path in checkpoint_paths(args.models)
    }
    path = args.results / "robustness.json"
    report = measure(networks, split, path, examples=args.examples, overwrite=args.overwrite, quiet=args.quiet)
    logs = training_logs(args.models, args.results)
    write_atomically(args.results / "robustness.md", tables.robustness_document(report, logs).encode())
    for name, figure in figures.robustness_figures(report, logs, networks, split).items():
        plotting.save(figure, args.results / "robustness" / f"{name}.png")
    if not args.quiet:
        print(f"\nsee {args.results / 'robustness.md'} and the figures in {args.results / 'robustness'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["robustness"]:
        del sys.argv[1]
        robustness_script()
    else:
        study_script()
