"""Accuracy: what is counted, against whom, and what an interrupted evaluation keeps."""

import importlib.util
import json
import sys
import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import fgsm
from attacks.core import ZERO_GRADIENT
from attacks.state import BATCH_DEPENDENT, RANDOM
from networks import CNN
from utils import evaluation
from utils.constants import UserError
from utils.data import batches
from utils.evaluation import (
    ATTACK_VERSIONS,
    ATTACKS,
    Result,
    accuracy,
    evaluate,
    evaluate_fgsm,
    predictions,
    report_row,
    transfer_matrix,
)
from utils.formats import AttackRow, decode, encode
from utils.notes import Notes
from utils.statistics import wilson_interval


class Fitted(nn.Module):
    """Least squares on 8 x 8 grey pixels: of digits it is right nine times in ten, and it is trained at once."""

    def __init__(self, split):
        super().__init__()
        images, labels = split.take(torch.arange(len(split)))
        features = self.features(images)
        gram = features.T @ features + 0.1 * torch.eye(features.shape[1])
        self.weight = nn.Parameter(torch.linalg.solve(gram, features.T @ F.one_hot(labels, 10).float()))

    @staticmethod
    def features(images):
        grey = F.avg_pool2d(images, 4).mean(1).flatten(1)
        return torch.cat([grey, torch.ones(len(grey), 1)], 1)

    def forward(self, images):
        return 10 * self.features(images) @ self.weight


@pytest.fixture(scope="module")
def network(digits):
    return Fitted(digits["train"].first(600))


@pytest.fixture(scope="module")
def other(digits):
    """A network that errs on other images."""
    return Fitted(digits["train"].first(60))


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("batch_size", [7, 300])
def test_evaluation_equals_attacking_all_at_once(transfer, batch_size, digits, network, other):
    source = other if transfer else None
    split, epsilons = digits["test"].first(60), [0.05, 0.0, 0.02]
    clean, *attacked = evaluate_fgsm(network, split, epsilons, source=source, batch_size=batch_size)
    images, labels = split.images / 255, split.labels
    assert clean.correct == attacked[1].correct == (network(images).argmax(1) == labels).sum()
    assert (clean.epsilon, clean.examples) == (0, 60)
    for result, epsilon in zip(attacked, epsilons, strict=True):
        adversarial = fgsm(source or network, images, labels, epsilon=epsilon)
        assert (result.epsilon, result.examples) == (epsilon, 60)
        assert result.correct == (network(adversarial).argmax(1) == labels).sum()
        assert result.accuracy == result.correct / 60
        assert result.transferred == transfer
    assert clean.accuracy == accuracy(network, split)


def test_the_networks_of_these_tests_cannot_stand_for_each_other(digits, network, other):
    split = digits["test"].first(60)
    pairs = product((network, other), repeat=2)
    results = [evaluate_fgsm(tested, split, [0.05], source=source) for tested, source in pairs]
    assert len({attacked.correct for _, attacked in results}) == 4
    assert results[0][0].correct != results[2][0].correct


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("transfer", [False, True])
def test_each_attack_is_evaluated_batch_by_batch(attack, transfer, digits, network, other):
    of = {"fgsm": {}, "pgd": {"steps": 3, "seed": 1}, "strong": {"steps": 3}}
    options = {**of, "autoattack": {"attacks": ["square"], "queries": 50}}[attack]
    source = other if transfer else None
    split = digits["test"].first(50)
    result = evaluate(network, split, attack, 0.05, options=options, source=source, batch_size=20)
    if attack in ("pgd", "strong") and transfer:
        options = {**options, "early_stop": False}
    expected = []
    for images, labels in batches(split, 20):
        adversarial = ATTACKS[attack](source or network, images, labels, epsilon=0.05, **options)
        expected += (network(adversarial).argmax(1) == labels).tolist()
    assert result.mask.tolist() == expected
    assert 0 < sum(expected) < 50
    assert (result.epsilon, result.correct, result.examples) == (0.05, sum(expected), 50)
    assert (result.attack, result.options, result.transferred) == (attack, options, transfer)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_examples_for_another_network_run_to_the_end_unless_asked_otherwise(loss, digits, network, other):
    """Stopped at the boundary of the network that crafts them, they would hardly fool the network that is tested."""
    split, options = digits["test"].first(100), {"steps": 10, "loss": loss}
    results = {
        asked: evaluate(network, split, "pgd", 0.05, source=other, options={**options, **given})
        for asked, given in ((None, {}), (False, {"early_stop": False}), (True, {"early_stop": True}))
    }
    assert torch.equal(results[None].mask, results[False].mask)
    assert results[None].correct < results[True].correct
    assert [report_row(result, "transfer").early_stop for result in results.values()] == [False, False, True]
    for source in (None, network):
        assert "early_stop" not in evaluate(network, split.first(2), "pgd", 0.05, source=source).options


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
def test_interrupted_evaluation_goes_on_after_its_last_batch(torn, digits, network, tmp_path, counted):
    split, path = digits["test"].first(100), tmp_path / "notes.jsonl"
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


class Linear(nn.Module):
    """A network whose weights are drawn from a seed."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 32 * 32, 10, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images):
        return images.flatten(1) @ self.weight


class Opposite(Linear):
    """The same tensors, other answers."""

    def forward(self, images):
        return -super().forward(images)


class Hiding(nn.Module):
    """Holds a network in a plain list, which its own state therefore lacks, and multiplies its logits."""

    def __init__(self, network, factor=1.0):
        super().__init__()
        self.hidden, self.factor = [network], factor

    def forward(self, images):
        return self.factor * self.hidden[0](images)


@pytest.fixture
def attacked(monkeypatch):
    """A list that grows with each batch that `evaluate` attacks; the attack changes nothing."""
    calls = []

    def attack(model, images, labels, *, targeted=False, **options):
        calls.append(options)
        return images

    for name in ("fgsm", "pgd"):
        monkeypatch.setitem(ATTACKS, name, attack)
    return calls


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.11},
        {"attack": "fgsm"},
        {"options": {"steps": 4, "seed": 0}},
        {"options": {"steps": 3, "seed": 1}},
        {"options": {"steps": 3, "seed": 0, "loss": "margin"}},
        {"options": {"steps": 3, "seed": 0, "norm": "l2"}},
        {"options": {"steps": 3, "seed": 0, "momentum": 1}},
        {"options": {}},
        {"target": 3},
        {"target": "random"},
        {"network": Linear(2)},
        {"network": Opposite(0)},
        {"source": Linear(2)},
        {"source": Opposite(1)},
        {"source": Linear(0)},
        {"source": None},
        {"batch_size": 3},
        lambda split: replace(split, images=split.images.flip(3)),
        lambda split: replace(split, labels=split.labels.flip(0)),
        "versions",
        "attack version",
    ],
)
def test_notes_about_something_else_are_not_used(change, digits, attacked, tmp_path, monkeypatch):
    split = digits["test"].first(4)
    notes = Notes(tmp_path / "notes.jsonl")
    of = {"network": Linear(0), "source": Linear(1), "attack": "pgd", "epsilon": 0.1, "batch_size": 2}
    of |= {"split": split, "options": {"steps": 3, "seed": 0}}
    evaluate(**of, notes=notes)
    evaluate(**of | {"network": Linear(0), "options": {"seed": 0, "steps": 3}}, notes=notes)  # the same once more
    assert len(attacked) == 2
    if change == "versions":
        monkeypatch.setattr(evaluation, "versions", lambda *names: {"torch": "another"})
    elif change == "attack version":
        monkeypatch.setitem(ATTACK_VERSIONS, "pgd", ATTACK_VERSIONS["pgd"] + 1)
    elif callable(change):
        of["split"] = change(split)
    else:
        of |= change
    evaluate(**of, notes=notes)
    assert len(attacked) > 2
    assert len(Notes(tmp_path / "notes.jsonl").rows) == 2  # and those of the first evaluation are still there


@pytest.mark.parametrize("other", [Hiding(Linear(1)), Hiding(Opposite(0)), Hiding(Linear(0), 2.0)])
def test_notes_tell_networks_apart_by_what_their_state_does_not_hold(other, digits):
    def key(network):
        return evaluation.evaluation_key(network, digits["test"].first(4), "pgd", 0.1, {}, None, 2)

    assert key(Hiding(Linear(0))) == key(Hiding(Linear(0)).eval()) != key(other)


def test_notes_need_a_network_with_weights(digits, attacked, tmp_path):
    """Two plain functions could not be told apart."""
    notes, split = Notes(tmp_path / "notes.jsonl"), digits["test"].first(4)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        evaluate(lambda images: Linear(0)(images), split, "fgsm", 0.1, notes=notes)
    assert evaluate(lambda images: Linear(0)(images), split, "fgsm", 0.1).examples == 4


def test_notes_of_another_length_are_not_used(digits, network, tmp_path):
    split, path = digits["test"].first(40), tmp_path / "notes.jsonl"
    expected = evaluate(network, split, "fgsm", 0.01, batch_size=20, notes=Notes(path))
    noted = Notes(path).rows
    ((key, [(hits, seconds), second]),) = noted.items()
    path.write_text("".join(json.dumps([key, *row]) + "\n" for row in ((hits + hits, seconds), second)))
    for _ in range(2):  # and then they are mended
        assert torch.equal(evaluate(network, split, "fgsm", 0.01, batch_size=20, notes=Notes(path)).mask, expected.mask)
    assert [hits for hits, _ in Notes(path).rows[key]] == [hits for hits, _ in noted[key]]
    assert noted[key][0][0] != noted[key][1][0]  # or one could stand for the other


def test_autocast_changes_nothing(digits):
    network, split = CNN(width=4), digits["test"].first(20)
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
        return report_row(Result(0.1, 1, 2, 3.00049, attack, options), "transfer", "a.safetensors")

    fgsm = row("fgsm")
    assert (fgsm.name, fgsm.setting, fgsm.source, fgsm.epsilon) == ("fgsm", "transfer", "a.safetensors", 0.1)
    assert (fgsm.examples, fgsm.accuracy, fgsm.seconds, fgsm.targeted) == (2, 0.5, 3.0, False)
    assert fgsm.confidence_interval == wilson_interval(1, 2)
    pgd = row("pgd", steps=5, loss="margin", seed=2)
    assert (pgd.steps, pgd.step_size, pgd.restarts, pgd.random_start) == (5, 0.05, 1, True)
    assert (pgd.loss, pgd.seed, pgd.queries) == ("margin", 2, None)
    assert row("pgd", step_size=0.02).step_size == 0.02
    autoattack = row("autoattack")
    assert (autoattack.queries, autoattack.attacks) == (5000, ["apgd-ce", "apgd-t", "fab-t", "square"])
    assert (pgd.eot, fgsm.eot, row("pgd", eot=5).eot, autoattack.eot) == (1, 1, 5, None)
    assert pgd.version == ATTACK_VERSIONS["pgd"]
    assert pgd.warning is None
    for made in (fgsm, pgd, autoattack):
        assert decode(encode(made), AttackRow) == made


@pytest.mark.filterwarnings("ignore:the model")
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_a_network_that_changes_is_told_of_and_the_report_says_so(attack, digits, network):
    def noisy(images):
        return network(images + 0.1 * torch.randn_like(images))

    def by_the_batch(images):
        return network(images + 0.1 * images.mean(0))

    split = digits["test"].first(20)
    for model, found in ((noisy, RANDOM), (by_the_batch, BATCH_DEPENDENT)):
        with pytest.warns(RuntimeWarning) as told:
            result = evaluate(model, split, attack, 0.05, batch_size=7)
        assert [str(warning.message) for warning in told] == [found]  # once, not for each batch
        assert result.unusual == (found,)
        row = report_row(result, "white_box")
        assert row.warning == found
        assert decode(encode(row), AttackRow) == row
        with pytest.warns(RuntimeWarning, match="the model"):
            assert [result.unusual for result in evaluate_fgsm(model, split, [0.1])] == [(found,)] * 2
    assert evaluate(network, split, attack, 0.05).unusual == ()


def test_honest_networks_cost_six_small_passes_more(digits, network):
    sizes = []

    def counted(images):
        sizes.append(len(images))
        return network(images)

    evaluate(counted, digits["test"].first(60), "fgsm", 0.05, batch_size=30)
    assert sizes == [16] * 5 + [12] + [30] * 4


@pytest.mark.filterwarnings("ignore:the model gives the same images other logits")
def test_a_random_network_is_judged_by_passes_that_no_attack_has_seen(digits, network):
    """Its logits drown in noise. An attack that chose among passes would leave far fewer images than chance does."""
    spread = 3 * network(digits["test"].first(50).images / 255).std().detach()

    def random(images):
        logits = network(images)
        return logits + spread * torch.randn_like(logits)

    torch.manual_seed(0)
    split = digits["test"].first(200)
    result = evaluate(random, split, "pgd", 0.0, options={"steps": 20})
    clean = evaluate_fgsm(random, split, [])[0]
    assert result.correct == pytest.approx(clean.correct, abs=25)
    assert evaluate_fgsm(random, split, [0.05], eot=3)[1].options == {"eot": 3}


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by 10 s while an attack crafts a batch, and by 1 s while a network classifies one."""
    now = [0.0]

    def taking(seconds, function):
        def timed(*arguments, **options):
            now[0] += seconds
            return function(*arguments, **options)

        return timed

    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(evaluation, "fgsm_direction", taking(10, lambda network, images, labels, eot: images.sign()))
    monkeypatch.setitem(ATTACKS, "fgsm", taking(10, lambda network, images, labels, epsilon: images))
    return taking(1, Linear(0))


@pytest.mark.parametrize("batch_size", [2, 5])
def test_seconds_are_those_of_crafting_and_of_an_attacks_own_forward_passes(batch_size, clock, digits):
    split = digits["test"].first(4)
    batches_of_it = -(-4 // batch_size)
    clean, *attacked = evaluate_fgsm(clock, split, [0.1, 0.2, 0.0], batch_size=batch_size)
    assert clean.seconds == batches_of_it
    assert [result.seconds for result in attacked] == [11 * batches_of_it] * 3
    direction = torch.zeros(4, 3, 32, 32, dtype=torch.int8)
    results = evaluate_fgsm(clock, split, [0.1], direction=direction, batch_size=batch_size)
    assert [result.seconds for result in results] == [batches_of_it] * 2  # crafted earlier
    assert evaluate(clock, split, "fgsm", 0.1, batch_size=batch_size).seconds == 11 * batches_of_it


def test_predictions_are_those_in_evaluation_mode_in_the_order_of_the_images(digits, network):
    images, _ = digits["test"].take(torch.arange(30))
    expected = network(images).argmax(1)
    dropping = nn.Sequential(nn.Dropout(0.9), network)
    assert not torch.equal(dropping(images).argmax(1), expected)
    assert torch.equal(predictions(dropping, images, batch_size=7), expected)
    assert dropping.training


def test_transfer_matrix_crafts_on_rows_and_tests_columns(digits, network, other):
    networks, split = [network, other], digits["test"].first(60)
    matrix = transfer_matrix(networks, split, 0.05, batch_size=25)
    for source, row in zip(networks, matrix, strict=True):
        for tested, result in zip(networks, row, strict=True):
            expected = evaluate_fgsm(tested, split, [0.05], source=source, batch_size=25)[1]
            assert (result.epsilon, result.correct, result.examples) == (0.05, expected.correct, 60)


def test_a_radius_that_is_surely_a_mistake_is_refused(digits, network):
    for attack in ("fgsm", "pgd"):
        with pytest.raises(ValueError, match="did you mean 8/255"):
            evaluate(network, digits["test"].first(2), attack, 8)


def test_a_slow_attack_says_within_a_batch_how_long_it_takes(digits, network, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # another test may have run a notebook
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])

    def slow(images):
        clock.append(clock[-1] + 4)
        return network(images)

    options = {"steps": 20, "restarts": 2, "early_stop": False}
    evaluate(slow, digits["test"].first(60), "pgd", 8 / 255, options=options, progress=True, batch_size=30)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == pytest.approx(clock[-1] / 32, abs=1)  # every half minute, at the next pass
    assert lines[0] == "pgd at 8/255: 5 of 60 images in 32 s, about 6 min left"
    done = [int(line.split()[3]) for line in lines]
    assert done == sorted(done)
    assert "in 3 min, about 3 min left" in "".join(lines)
    accuracy = evaluate(network, digits["test"].first(30), "pgd", 8 / 255, options=options).accuracy
    assert lines[-1].endswith(f"left, accuracy {accuracy:.1%}")


def test_fgsm_says_the_accuracy_so_far(digits, network, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr("utils.progress.SECONDS_BETWEEN_LINES", 0)
    clean, attacked = evaluate_fgsm(network, digits["test"].first(60), [8 / 255], batch_size=30, progress=True)
    first, last = capsys.readouterr().err.splitlines()
    halves = [evaluate_fgsm(network, digits["test"].first(30), [8 / 255])[i].accuracy for i in (0, 1)]
    assert first.startswith("evaluating: 30 of 60 images in 0 s, about 0 s left")
    assert last.endswith(f"at 0 {halves[0]:.1%}, at 8/255 {halves[1]:.1%}")
    assert clean.accuracy > attacked.accuracy


def test_evaluation_leaves_the_network_in_its_mode(digits):
    network = CNN(width=4).train()
    network.features[0].eval()
    modes = [module.training for module in network.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluate_fgsm(network, digits["test"].first(20), [0.1])
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_masks_of_fgsm_and_the_success_rate_agree_with_evaluate(digits):
    """The success rate counts the images that are right without the attack."""
    torch.manual_seed(0)
    network, split = CNN(width=4), digits["test"].first(50)
    clean, attacked = evaluate_fgsm(network, split, [0.1], batch_size=8)
    assert torch.equal(attacked.mask, evaluate(network, split, "fgsm", 0.1, batch_size=8).mask)
    assert int(clean.mask.sum()) == clean.correct
    row = report_row(attacked, "white_box", clean=clean, per_image=True)
    lost = (clean.mask & ~attacked.mask).sum().item()
    assert row.success_rate == pytest.approx(lost / clean.correct)
    assert row.hits == "".join(str(int(hit)) for hit in attacked.mask)
    assert report_row(attacked, "white_box").success_rate is None


# ---- targets ----


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("target", [3, "least-likely", "random"])
@pytest.mark.parametrize("transfer", [False, True])
def test_with_a_target_success_is_to_be_classified_as_it(attack, target, transfer, digits, network, other, tmp_path):
    source, split = other if transfer else network, digits["test"].first(60)
    images, labels = split.images / 255, split.labels
    options = {"seed": 5} if attack == "pgd" else {}
    given = {"options": options, "source": source, "batch_size": 60, "target": target}
    result = evaluate(network, split, attack, 0.1, **given, notes=Notes(tmp_path / "n"))
    if target == "random":
        drawn = torch.randint(1, 10, (60,), generator=torch.Generator().manual_seed(options.get("seed", 0)))
        goals = (labels + drawn) % 10
        assert (goals != labels).all()
        assert len(goals.unique()) == 10
    else:
        goals = source(images).argmin(1) if target == "least-likely" else torch.full((60,), 3)
    counted = goals != labels
    stop = {"early_stop": False} if transfer and attack == "pgd" else {}
    moved = ATTACKS[attack](source, images[counted], goals[counted], epsilon=0.1, targeted=True, **options, **stop)
    predicted = network(moved).argmax(1)
    assert result.examples == counted.sum()
    assert (counted.sum() < 60) == (target == 3)
    assert result.correct == (predicted == labels[counted]).sum()
    reached = (predicted == goals[counted]).sum().item()
    assert reached > 0
    clean, _ = evaluate_fgsm(network, split, [0.1])
    row = report_row(result, "white_box", clean=clean, per_image=True)
    assert row.success_rate == reached / result.examples
    assert (row.target, row.targeted, row.hits.count("-"), row.hits.count("t")) == (
        str(target),
        True,
        60 - result.examples,
        reached,
    )
    assert [hit == "-" for hit in row.hits] == (~counted).tolist()
    assert decode(encode(row), AttackRow) == row
    again = evaluate(network, split, attack, 0.1, **given, notes=Notes(tmp_path / "n"))
    assert (again, again.outcomes) == (result, result.outcomes)


def test_an_image_whose_label_is_the_target_is_not_moved(digits, network):
    split, crafted = digits["test"].first(40), []
    options = {"early_stop": False}
    evaluate(network, split, "pgd", 0.1, target=3, options=options, on_batch=crafted.append)
    moved = (torch.cat(crafted) - split.images / 255).abs().flatten(1).amax(1) > 0
    assert torch.equal(moved, split.labels != 3)


@pytest.mark.parametrize("target", [10, -1, "cat", "3"])
def test_a_target_that_is_not_a_class_is_one_line(target, digits, network):
    with pytest.raises(UserError, match=f"must be a class from 0 to 9, least-likely or random, not {target!r}"):
        evaluate(network, digits["test"].first(4), "pgd", 0.1, target=target)


def test_targets_that_cannot_be_attacked_are_one_line(digits, network):
    split = digits["test"].first(4)
    with pytest.raises(UserError, match="autoattack has no targets"):
        evaluate(network, split, "autoattack", 0.1, target=3)
    with pytest.raises(UserError, match="the target 7 is the label of every image"):
        evaluate(network, replace(split, labels=torch.full((4,), 7)), "pgd", 0.1, target=7)


# ---- upper bounds ----


class Flat(nn.Module):
    """Always certain of class 0, so that no gradient is left."""

    def forward(self, images):
        return torch.eye(10)[[0] * len(images)] * 100 - 5 + 0 * images.sum((1, 2, 3))[:, None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("attack", "how", "reasons"),
    [
        ("fgsm", {}, ["one step"]),
        ("pgd", {}, []),
        ("pgd", {"transfer": True}, ["transferred"]),
        ("pgd", {"transfer": True, "options": {"early_stop": True}}, ["transferred", "early stop"]),
        ("pgd", {"target": "random"}, ["one target"]),
        ("pgd", {"epsilon": 0.0}, []),
        ("autoattack", {"options": {"attacks": ["apgd-ce"]}}, ["part of AutoAttack"]),
        ("strong", {"options": {"steps": 2}}, []),
        ("strong", {"options": {"steps": 2}, "transfer": True}, ["transferred"]),
        ("pgd", {"network": Flat()}, ["zero gradient"]),
        ("fgsm", {"network": Flat()}, ["one step", "zero gradient"]),
        ("pgd", {"network": lambda x: Linear(0)(x + torch.rand_like(x) / 2)}, ["random"]),
        ("pgd", {"network": lambda x: Linear(0)(x - x.mean(0))}, ["batch dependent"]),
        ("pgd", {"network": lambda x: Linear(0)(x).softmax(1)}, ["probabilities"]),
    ],
)
def test_a_report_says_why_a_figure_is_only_an_upper_bound(attack, how, reasons, digits, network, other):
    options = {"attack": attack, "epsilon": how.get("epsilon", 0.02), "options": how.get("options")}
    options |= {"target": how.get("target"), "source": other if how.get("transfer") else None}
    result = evaluate(how.get("network", network), digits["test"].first(20), **options)
    row = report_row(result, "white_box")
    assert row.upper_bound == reasons
    assert decode(encode(row), AttackRow) == row


@pytest.mark.parametrize(("queries", "whole"), [(4999, False), (5000, True), (6000, True)])
def test_autoattack_with_its_standard_queries_is_whole(queries, whole):
    result = Result(
        0.1, 1, 2, 0.0, "autoattack", {"queries": queries, "attacks": ["square", "fab-t", "apgd-t", "apgd-ce"]}
    )
    assert evaluation.upper_bound(result) == ([] if whole else ["part of AutoAttack"])
    assert evaluation.upper_bound(Result(0.1, 1, 2, 0.0, "autoattack")) == []
    transferred = Result(0.1, 1, 2, 0.0, "autoattack", transferred=True)  # it stops where the source is fooled
    assert evaluation.upper_bound(transferred) == ["transferred", "early stop"]


@pytest.mark.filterwarnings("ignore")
def test_zero_gradients_are_remembered_by_notes_and_by_fgsm(digits, tmp_path):
    split = digits["test"].first(20)
    first, second = (
        evaluate(Flat(), split, "pgd", 0.1, batch_size=7, notes=Notes(tmp_path / "n"), options={"steps": 2})
        for _ in range(2)
    )
    assert first == second
    assert ZERO_GRADIENT in second.unusual
    assert first.correct == (split.labels == 0).sum() > 0
    clean, attacked = evaluate_fgsm(Flat(), split, [0.1])
    assert (ZERO_GRADIENT in clean.unusual, ZERO_GRADIENT in attacked.unusual) == (False, True)


def test_notes_tell_two_classes_of_one_name_apart_by_their_code(tmp_path, monkeypatch):
    code = (
        "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return super().forward({})\n"
    )
    found = []
    for number, what in enumerate(("x.flatten(1)", "1 - x.flatten(1)", "x.flatten(1)")):
        (tmp_path / f"net{number}.py").write_text(code.format(what))
        spec = importlib.util.spec_from_file_location(f"net{number}", tmp_path / f"net{number}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"net{number}", module)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        found.append(evaluation.described(module.Net(12, 3)))
    assert found[0] == found[2] != found[1]


def test_attacks_options_and_radii_that_do_not_exist_are_refused(network, digits):
    """Above all, `targeted` is not an option: the labels would be the targets, and the accuracy would be wrong."""
    split = digits["test"].first(4)
    for attack, options, message in (
        ("fgsm", {"targeted": True}, "targeted is not among the options: give the argument target"),
        ("pgd", {"epsilon": 0.1}, "epsilon is not among the options: give the argument epsilon"),
        ("cw", {}, "attack must be one of fgsm, pgd, strong, autoattack, not 'cw'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(network, split, attack, 0.1, options=options)
    with pytest.raises(UserError, match="least-likely or random, not '1'"):
        evaluate(network, split, "fgsm", 0.1, target="1")
    with pytest.raises(ValueError, match="an L2 radius, must be finite"):
        evaluate(network, split, "pgd", float("inf"), options={"norm": "l2"})
