"""Accuracies, their intervals and their pictures."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from scipy.stats import binomtest

from attacks import fgsm
from utils import plotting
from utils.checkpoints import load_checkpoint
from utils.data import batches
from utils.evaluation import ATTACKS, Result, accuracy, evaluate, evaluate_fgsm, report_row
from utils.notes import Notes
from utils.statistics import wilson_interval


@pytest.mark.parametrize(("correct", "examples"), [(0, 1), (1, 1), (0, 300), (7, 10), (299, 300), (8037, 10_000)])
def test_wilson_interval_is_scipys(correct, examples):
    expected = binomtest(correct, examples).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, examples) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("batch_size", [7, 300])
def test_evaluation_equals_attacking_all_at_once(transfer, batch_size, digits, trained):
    network = load_checkpoint(trained("cnn"))
    source = load_checkpoint(trained("cnn-lstm")) if transfer else None
    split, epsilons = digits["test"].first(60), [0.1, 0.0, 0.02]
    clean, *attacked = evaluate_fgsm(network, split, epsilons, source=source, batch_size=batch_size)
    images, labels = split.images / 255, split.labels
    assert clean.correct == attacked[1].correct
    assert abs(clean.correct - (network(images).argmax(1) == labels).sum()) <= 1  # batches differ in rounding
    for result, epsilon in zip(attacked, epsilons, strict=True):
        adversarial = fgsm(source or network, images, labels, epsilon=epsilon)
        assert (result.epsilon, result.examples) == (epsilon, 60)
        assert abs(result.correct - (network(adversarial).argmax(1) == labels).sum()) <= 1
        assert result.accuracy == result.correct / 60
    assert clean.accuracy == accuracy(network, split)


OPTIONS = {"fgsm": {}, "pgd": {"steps": 3, "seed": 1}, "autoattack": {"attacks": ["apgd-ce"]}}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("transfer", [False, True])
def test_each_attack_is_evaluated_batch_by_batch(attack, transfer, digits, trained):
    network = load_checkpoint(trained("cnn"))
    source = load_checkpoint(trained("cnn-lstm")) if transfer else None
    split = digits["test"].first(50)
    result = evaluate(network, split, attack, 0.05, options=OPTIONS[attack], source=source, batch_size=20)
    expected = []
    for images, labels in batches(split, 20):
        adversarial = ATTACKS[attack](source or network, images, labels, epsilon=0.05, **OPTIONS[attack])
        expected += (network(adversarial).argmax(1) == labels).tolist()
    assert result.mask.tolist() == expected
    assert (result.correct, result.examples, result.attack) == (sum(expected), 50, attack)
    assert result.options == OPTIONS[attack]


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with each call of FGSM by `evaluate`; the third is interrupted."""
    calls = []

    def counted(*args, **options):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fgsm(*args, **options)

    monkeypatch.setitem(ATTACKS, "fgsm", counted)
    return calls


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_evaluation_goes_on_after_its_last_batch(torn, digits, trained, tmp_path, counted):
    network, split, path = load_checkpoint(trained("cnn")), digits["test"].first(100), tmp_path / "notes.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, split, "fgsm", 0.05, batch_size=20, notes=Notes(path))
    if torn:
        path.write_text(path.read_text()[:-9])  # killed while it wrote of the second batch
    notes = Notes(path)
    result = evaluate(network, split, "fgsm", 0.05, batch_size=20, notes=notes)
    assert len(counted) == 3 + (4 if torn else 3)
    whole = evaluate(network, split, "fgsm", 0.05, batch_size=20)
    assert torch.equal(result.mask, whole.mask)

    # Until they are finished with, what is done is done, and other evaluations are noted beside it.
    counted.clear()
    again = evaluate(network, split, "fgsm", 0.05, batch_size=20, notes=Notes(path))
    assert counted == []
    assert again == result
    notes.finish()
    assert not path.exists()


def test_notes_of_any_length_are_kept(tmp_path):
    """However small its batches, an evaluation of hours is not begun again."""
    path = tmp_path / "notes.jsonl"
    rows = [("1", 0.001)] * 20_000
    Notes(path).add("a" * 64, rows)
    before = path.read_bytes()
    assert len(before) > 2**20
    assert Notes(path).kept("a" * 64, [1] * 20_000) == rows
    assert path.read_bytes() == before


class Wrapped(torch.nn.Module):
    """The same tensors, another network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return -self.network(images)


def test_notes_about_something_else_are_not_used(digits, trained, tmp_path, monkeypatch):
    same = {"network": load_checkpoint(trained("cnn")), "split": digits["test"].first(40), "epsilon": 0.1}
    notes = Notes(tmp_path / "notes.jsonl")
    with monkeypatch.context() as patch:  # notes of an evaluation in which the attack does nothing
        patch.setitem(ATTACKS, "fgsm", lambda model, images, labels, epsilon, targeted=False: images)
        assert evaluate(**same, attack="fgsm", notes=notes).correct > 30
    assert evaluate(**same, attack="fgsm", notes=notes).correct > 30  # which is what the notes say
    changes = (
        {"epsilon": 0.11},
        {"split": digits["test"].first(41)},
        {"network": load_checkpoint(trained("cnn-lstm"))},
        {"network": Wrapped(same["network"])},
        {"batch_size": 39},
    )
    for change in changes:
        assert evaluate(**(same | change), attack="fgsm", notes=notes).correct < 20


@pytest.mark.parametrize(
    "line", [None, [], 7, {"a": 1}, ["key"], ["key", "01"], ["key", "0121", 1.0], ["key", "01", "1"], [1, "01", 1.0]]
)
def test_damaged_notes_are_dropped(line, tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps(["other", "10", 0.5]) + "\n" + json.dumps(line) + "\n")
    assert Notes(path).rows == {"other": [("10", 0.5)]}
    assert path.read_text() == '["other", "10", 0.5]\n'


def test_notes_of_another_length_are_not_used(digits, trained, tmp_path):
    network, split, path = load_checkpoint(trained("cnn")), digits["test"].first(40), tmp_path / "notes.jsonl"
    expected = evaluate(network, split, "fgsm", 0.01, batch_size=20, notes=Notes(path))
    noted = Notes(path).rows
    ((key, [(hits, seconds), second]),) = noted.items()
    path.write_text("".join(json.dumps([key, *row]) + "\n" for row in ((hits + hits, seconds), second)))
    for _ in range(2):  # and then they are mended
        assert torch.equal(evaluate(network, split, "fgsm", 0.01, batch_size=20, notes=Notes(path)).mask, expected.mask)
    assert [hits for hits, _ in Notes(path).rows[key]] == [hits for hits, _ in noted[key]]
    assert noted[key][0][0] != noted[key][1][0]  # or one could stand for the other


def test_autocast_changes_nothing(digits, trained):
    network, split = load_checkpoint(trained("cnn")), digits["test"].first(60)
    dtypes = []
    network.features[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    expected = evaluate(network, split, "pgd", 0.05, options={"steps": 2})
    results = evaluate_fgsm(network, split, [0.05])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(evaluate(network, split, "pgd", 0.05, options={"steps": 2}).mask, expected.mask)
        under_autocast = evaluate_fgsm(network, split, [0.05])
    assert [r.correct for r in under_autocast] == [r.correct for r in results]
    assert set(dtypes) == {torch.float32}


def test_report_has_all_of_an_attacks_parameters():
    def row(attack, **options):
        return report_row(Result(0.1, 1, 2, 3.0, attack, options), "white_box")

    assert row("fgsm").items() >= {"name": "fgsm", "epsilon": 0.1, "targeted": False, "accuracy": 0.5}.items()
    pgd = {"steps": 5, "step_size": 0.05, "restarts": 1, "random_start": True, "loss": "margin", "seed": 2}
    assert row("pgd", steps=5, loss="margin", seed=2).items() >= pgd.items()
    assert row("pgd", step_size=0.02)["step_size"] == 0.02
    assert row("autoattack")["queries"] == 5000
    assert row("autoattack")["attacks"] == ("apgd-ce", "apgd-t", "fab-t", "square")


def test_evaluation_leaves_the_network_in_its_mode(digits, trained):
    network = load_checkpoint(trained("cnn")).train()
    network.features[0].eval()
    modes = [module.training for module in network.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluate_fgsm(network, digits["test"], [0.1])
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def report(epsilons):
    attacks = [
        {"name": "fgsm", "setting": "white_box", "epsilon": e, "accuracy": 0.5 - e, "confidence_interval": [0.3, 0.6]}
        for e in epsilons
    ]
    return {
        "network": "cnn",
        "dataset": "digits",
        "split": "test",
        "examples": 300,
        "clean_accuracy": 0.9,
        "clean_confidence_interval": [0.85, 0.95],
        "attacks": attacks,
    }


@pytest.mark.parametrize("epsilons", [[0.1], [0.1, 0.02, 0.3], [0.0, 0.1]])
def test_accuracy_figure_draws_the_reports_points_in_order(epsilons):
    figure = plotting.accuracy_against_epsilon(report(epsilons))
    x, y = figure.axes[0].lines[0].get_data()
    drawn = [0, *sorted(e for e in epsilons if e)]
    assert list(x) == pytest.approx(drawn)
    assert list(y) == pytest.approx([90] + [100 * (0.5 - e) for e in drawn[1:]])
    plt.close(figure)


def test_examples_figure_shows_what_the_network_says(digits, trained):
    network = load_checkpoint(trained("cnn"))
    figure = plotting.adversarial_examples(network, digits["test"], 0.1, columns=3)
    assert len(figure.axes) == 9
    for column in range(3):
        image, perturbation, adversarial = figure.axes[column::3]
        shown = torch.from_numpy(image.images[0].get_array()).permute(2, 0, 1)[None].float()
        attacked = torch.from_numpy(adversarial.images[0].get_array()).permute(2, 0, 1)[None].float()
        assert (attacked - shown).abs().max() <= 0.1 + 1e-6
        assert 0 <= perturbation.images[0].get_array().min() <= perturbation.images[0].get_array().max() <= 1
        for panel, axis in ((shown, image), (attacked, adversarial)):
            confidence, predicted = network(panel).softmax(1).max(1)
            assert axis.get_xlabel() == f"{predicted.item()}, {100 * confidence.item():.1f} %"
    plt.close(figure)


def test_examples_figure_copes_with_epsilon_zero_and_few_images(digits, trained, tmp_path):
    network = load_checkpoint(trained("cnn"))
    plotting.save(plotting.adversarial_examples(network, digits["test"].first(5), 0, columns=4), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
def test_examples_figure_of_a_network_that_gets_nothing_right(digits):
    only_ones = replace(digits["test"], labels=torch.ones_like(digits["test"].labels))
    always_zero = torch.eye(10)[:1]
    figure = plotting.adversarial_examples(
        lambda images: always_zero + 0 * images.sum((1, 2, 3))[:, None], only_ones, 0.1, columns=4
    )
    assert len(figure.axes) == 12
    plt.close(figure)
