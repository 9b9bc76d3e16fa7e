"""What utils.plotting draws is what was measured."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from utils import plotting
from utils.checkpoints import load_checkpoint
from utils.formats import AttackRow, TestReport


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
