"""TODO: study.formats."""

from itertools import product

from networks import NETWORKS
from study.paper import TRAINING_EPSILONS
from utils.constants import ARCHITECTURES, EPSILONS, UserError
from utils.formats import check_numbers, check_strings, check_training, checked_list, read_json
from utils.quoting import reason, shown


def find(report, name, attack, epsilon, setting="white_box", **options):
    """The result of an attack on the network of that name. Raises UserError if the report has none, or several."""
    wanted = {"name": attack, "setting": setting, "epsilon": epsilon, **options}
    results = [row for entry in report["networks"] if entry["name"] == name for row in entry["results"]]
    rows = [row for row in results if wanted.items() <= row.items()]
    if len(rows) != 1:
        raise UserError(
            f"the report on robustness has {len(rows)} results of {attack}, {setting}, at epsilon {epsilon:.4g} on "
            f"{shown(name)}, and not one: python -m study robustness makes it whole"
        )
    return rows[0]


def read_robustness(path):
    """The report in a JSON file. Raises UserError unless it is one that `measure` wrote."""
    try:
        report = read_json(path)
        check_strings((report["dataset"], report["split"]))
        for entry in checked_list(report["networks"]):
            check_strings(entry[key] for key in ("name", "network", "sha256", "source_sha256"))
            if entry["network"] not in NETWORKS:
                raise ValueError(f"{shown(entry['network'])} is no network")
            check_numbers([entry["parameters"]], 0, 1e12)
            check_training(entry["training"])
            for row in checked_list(entry["results"]):
                check_strings((row["name"], row["setting"]))
                check_numbers([row["examples"]], 1, 1e9)
                check_numbers([row["seconds"]], 0, 1e9)
                check_numbers([row["epsilon"], row["accuracy"], *row["confidence_interval"]], 0, 1)
                _, _ = row["confidence_interval"]
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no report on robustness ({reason(error)}); delete it") from error


def read_study(path):
    """The report in a JSON file. Raises UserError unless it is one that `Study` wrote."""
    try:
        report = read_json(path)
        check_strings((report["dataset"], report["split"]))
        check_numbers([report["examples"]], 1, 1e9)
        for entry in checked_list(report["networks"]):
            check_strings(entry[key] for key in ("name", "network", "sha256", "part"))
            check_numbers([entry["seed"]], 0, 2**63)
            check_numbers([entry["validation_accuracy"]], 0, 1)
            check_training(entry["training"])
            if entry["network"] not in ARCHITECTURES or entry["training_epsilon"] not in (None, *TRAINING_EPSILONS):
                raise ValueError(f"{shown(entry['name'])} is no network of the study")
            seconds = [entry["evaluation_seconds"]]
            if entry["training_seconds"] is not None:
                seconds.append(entry["training_seconds"])
            if entry["training_epsilon"] is None:
                seconds.append(entry["adversarial_set_seconds"])
            check_numbers(seconds, 0, 1e9)
            for rows in (entry["transfer"], entry["white_box"]):
                if [row["epsilon"] for row in rows] != list(EPSILONS):
                    raise ValueError(f"{entry['name']} is not tested at the epsilons of the study")
                for row in rows:
                    low, high = row["confidence_interval"]
                    check_numbers((row["accuracy"], low, high), 0, 1)
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no report of a study ({reason(error)}); delete it") from error


def read_whole_study(path):
    """The report of a study that is done. Raises UserError as `read_study` does, and if a network is missing."""
    report = read_study(path)
    found = [(entry["network"], entry["training_epsilon"]) for entry in report["networks"] if entry["part"] == "study"]
    if found != list(product(ARCHITECTURES, (None, *TRAINING_EPSILONS))):
        raise UserError(
            f"{path} is not of the whole study, its networks in order; python -m study does what is missing"
        )
    return report
