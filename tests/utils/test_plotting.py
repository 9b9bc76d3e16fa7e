"""What utils.plotting draws is what was measured."""

from dataclasses import replace

import matplotlib.pyplot as plt
import msgspec
import pytest
import torch

from utils import plotting
from utils.checkpoints import load_checkpoint
from utils.formats import AttackRow, MinimalEpsilons, TestReport


def report(epsilons):
    return TestReport(
        checkpoint="a.safetensors",
        network="cnn",
        dataset="digits",
        split="test",
        examples=300,
        clean_accuracy=0.9,
        clean_confidence_interval=(0.85, 0.95),
        attacks=[
            AttackRow(
                name="fgsm",
                setting="white_box",
                epsilon=epsilon,
                accuracy=0.5 - epsilon,
                confidence_interval=(0.3, 0.6),
                seconds=1.0,
            )
            for epsilon in epsilons
        ],
    )


@pytest.mark.parametrize("epsilons", [[0.1], [0.1, 0.02, 0.3], [0.0, 0.1]])
def test_accuracy_figure_draws_the_reports_points_in_order(epsilons):
    figure = plotting.accuracy_against_epsilon(report(epsilons))
    x, y = figure.axes[0].lines[0].get_data()
    drawn = [0, *sorted(e for e in epsilons if e)]
    assert list(x) == pytest.approx(drawn)
    assert list(y) == pytest.approx([90] + [100 * (0.5 - e) for e in drawn[1:]])
    plt.close(figure)


def test_each_setting_has_its_own_colour_and_radii_are_written_as_in_tables():
    rows = report([8 / 255, 0.1]).attacks
    rows += [msgspec.structs.replace(row, name="pgd", setting="transfer") for row in rows]
    figure = plotting.accuracy_against_epsilon(msgspec.structs.replace(report([]), attacks=rows))
    axes = figure.axes[0]
    assert [line.get_color() for line in axes.lines[:2]] == [plotting.WHITE_BOX, plotting.TRANSFER]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "8/255", "0.1"]
    plt.close(figure)


def test_robustness_curve_is_the_part_that_has_not_fallen():
    found = MinimalEpsilons(norm="l2", steps=20, examples=5, median=0.5, epsilons=[0.5, None, 0.0, 0.25, 1.5])
    figure = plotting.robustness_curve(msgspec.structs.replace(report([]), minimal_epsilon=found))
    (axes,) = figure.axes
    x, y = axes.lines[0].get_data()
    assert list(x) == [0, 0, 0.25, 0.5, 1.5]
    assert list(y) == pytest.approx([100, 80, 60, 40, 20])
    assert list(axes.lines[1].get_xdata()) == [0.5, 0.5]
    assert axes.get_xlabel().startswith("epsilon (L2")
    plt.close(figure)
    with pytest.raises(ValueError, match="no minimal epsilons"):
        plotting.robustness_curve(report([]))


def test_an_l2_report_is_drawn_as_one():
    rows = [msgspec.structs.replace(row, norm="l2") for row in report([0.5]).attacks]
    figure = plotting.accuracy_against_epsilon(msgspec.structs.replace(report([]), attacks=rows))
    assert figure.axes[0].get_xlabel().startswith("epsilon (L2")
    plt.close(figure)


def test_colours_mean_one_thing():
    meanings = (
        plotting.BASELINE,
        plotting.STUDYS,
        plotting.OURS,
        plotting.CLEAN,
        plotting.TRANSFER,
        plotting.WHITE_BOX,
    )
    colours = [*meanings, *plotting.OTHERS]
    assert len(set(colours)) == len(colours)


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


@pytest.mark.parametrize("draw", [plotting.input_gradients, plotting.targeted_examples])
def test_gradient_and_targeted_figures_show_each_network(draw, digits, trained):
    networks = {"baseline": load_checkpoint(trained("cnn")), "robust": load_checkpoint(trained("cnn-lstm"))}
    figure = draw(networks, digits["test"], "CNN", columns=3)
    assert len(figure.axes) == 9
    images, baseline, robust = ([axis.images[0].get_array() for axis in figure.axes[i : i + 3]] for i in (0, 3, 6))
    for image, one, other in zip(images, baseline, robust, strict=True):
        assert (one != image).any()
        assert (one != other).any()
    plt.close(figure)


def test_targeted_examples_reach_the_other_class_within_epsilon(digits, trained):
    network = load_checkpoint(trained("cnn"))
    images, labels = digits["test"].take(slice(6))
    targets = (labels + 1) % 10
    moved = plotting.towards(network, images, targets, epsilon=0.5, steps=20)
    assert (moved - images).abs().max() <= 0.5 + 1e-6
    assert 0 <= moved.min() <= moved.max() <= 1
    assert (network(moved).argmax(1) == targets).all()


@pytest.mark.parametrize("name", ["$\\frac$", "$", "a\nb", "\ud800", "100 %"])
def test_names_from_a_file_are_drawn_as_they_are(name):
    """Matplotlib would take "$...$" for a formula, and fail if it is not one."""
    whole = msgspec.structs.replace(report([0.1]), dataset=name, network=name)
    plotting.png(plotting.accuracy_against_epsilon(whole), dpi=20)


def test_a_report_without_attacks_is_drawn():
    figure = plotting.accuracy_against_epsilon(msgspec.structs.replace(report([]), attacks=[]))
    assert figure.axes[0].get_title().startswith("No attack against the CNN")
    plt.close(figure)
