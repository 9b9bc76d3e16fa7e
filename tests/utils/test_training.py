"""The training loop: it learns, repeats itself bit for bit, and loses nothing when it is interrupted."""

import dataclasses
import functools
import itertools
import json
import os

import numpy
import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import asdict, replace
from torch import nn

from defenses.losses import FGSM, PGD
from networks import CNN, NETWORKS
from utils.checkpoints import (
    CheckpointError,
    check_saveable,
    load_checkpoint,
    read_metadata,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from utils.constants import UserError
from utils.data import load_split, training_batches
from utils.evaluation import accuracy
from utils.formats import CheckpointHeader, RunState, TrainingArguments
from utils.optimizers import moving_average
from utils.recipes import RECIPES, Recipe
from utils.runs import (
    USUAL_OPTIONS,
    Interrupted,
    PartialRun,
    TrainingError,
    argument_differences,
    described,
    read_epochs,
    read_log,
    training_arguments,
)
from utils.training import cross_entropy, train
from utils.validation import RobustValidation

RECIPE = replace(RECIPES["one-cycle"], epochs=3, batch_size=40, lr=0.05)  # of run's 120 images: three steps an epoch


def run(digits, output, name="cnn", recipe=RECIPE, **options):
    training, validation = digits["train"].first(120), digits["validation"].first(60)
    return train(name, training, validation, recipe, output=output, **{"width": 4, "quiet": True, **options})


def tensors_of(checkpoint):
    return read_tensors(checkpoint, CheckpointHeader)[1]


def interrupted_after(steps, loss=cross_entropy):
    """A defence that behaves like `loss` for so many steps, then like Ctrl-C."""
    done = 0

    @functools.wraps(loss)
    def defense(model, images, labels):
        nonlocal done
        done += 1
        if done > steps:
            raise KeyboardInterrupt
        return loss(model, images, labels)

    return defense


def log(path):
    """The log without what differs between two runs of the same training."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("name", ["cnn", "cnn-lstm", "small-cnn"])
def test_it_learns(name, digits, trained):
    metadata = read_metadata(trained(name))
    assert metadata.validation_accuracy > 0.85
    network = load_checkpoint(trained(name))
    validation = digits["validation"]
    with torch.no_grad():
        predicted = network(validation.images / 255).argmax(1)
    assert (predicted == validation.labels).float().mean().item() == pytest.approx(metadata.validation_accuracy)


def test_checkpoint_says_how_it_was_made(digits, tmp_path):
    run(digits, tmp_path / "a.safetensors", seed=5)
    metadata = read_metadata(tmp_path / "a.safetensors")
    lines = log(tmp_path / "a.jsonl")
    assert metadata.dataset == "digits"
    assert metadata.class_names == list("0123456789")
    assert metadata.training.seed == 5
    assert metadata.training.lr == 0.05
    assert metadata.epochs == 3
    assert metadata.validation_accuracy == lines[-1]["validation_accuracy"]
    assert lines[0].items() >= asdict(metadata.training).items()
    assert [line["epoch"] for line in lines[1:]] == [1, 2, 3]


def test_normalisation_comes_from_the_training_images(digits, tmp_path):
    network = run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPE, epochs=1))
    mean, std = digits["train"].first(120).channel_statistics()
    torch.testing.assert_close(network.normalize.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(network.normalize.std.flatten(), torch.tensor(std))


def test_whitened_filters_are_not_trained_and_activation_is_loaded_back(digits, tmp_path):
    recipe = replace(RECIPES["fast"], epochs=1, activation="silu")
    network = run(digits, tmp_path / "a.safetensors", recipe=recipe)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    for each in (network, loaded):
        assert isinstance(each.features[0][1], nn.SiLU)
        filters = each.features[0][0].weight
        assert torch.equal(filters[: len(filters) // 2], -filters[len(filters) // 2 :])


def test_same_seed_same_file_and_another_seed_another(digits, tmp_path):
    files = []
    for i, seed in enumerate((1, 1, 2)):
        torch.rand(i)  # the state of the global generator must not matter
        run(digits, tmp_path / f"{i}.safetensors", seed=seed)
        files.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def noisy(model, images, labels):
    """A defence that draws from torch's global generator, as random-start defences do."""
    return cross_entropy(model, images + 0.1 * torch.rand_like(images), labels)


@pytest.mark.parametrize(
    ("name", "recipe", "average", "steps"),  # steps: in the first epoch, in the second, in the third
    [
        ("cnn", "one-cycle", 0.0, 1),
        ("cnn", "one-cycle", 0.9, 5),
        ("cnn", "paper", 0.9, 8),
        ("cnn-lstm", "paper", 0.0, 5),
        ("cnn-lstm", "one-cycle", 0.9, 8),
        ("cnn", "fast", 0.0, 5),
        ("cnn-lstm", "robust", 0.9, 5),
    ],
)
def test_resumed_run_ends_bit_identical(name, recipe, average, steps, digits, tmp_path):
    recipe = replace(RECIPES[recipe], epochs=3, batch_size=40, average=average)
    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    run(digits, whole, name, recipe, defense=noisy)
    with pytest.raises(KeyboardInterrupt):
        run(digits, halves, name, recipe, defense=interrupted_after(steps, noisy))
    assert not halves.exists()
    torch.rand(3)
    run(digits, halves, name, recipe, defense=noisy, resume=True)
    assert halves.read_bytes() == whole.read_bytes()
    assert log(halves.with_suffix(".jsonl")) == log(whole.with_suffix(".jsonl"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "whole.safetensors",
        "whole.jsonl",
        "halves.safetensors",
        "halves.jsonl",
    }


def test_averaged_weights_of_an_lstm_are_made_one_block_for_cudnn(monkeypatch):
    """A CPU does not have such blocks, so the test checks the call itself."""
    called = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda lstm: called.append(lstm))
    average = moving_average(NETWORKS["cnn-lstm"](4), 0.9)
    assert average.module.lstm in called


def test_moving_average_of_the_weights_is_what_is_kept(digits, tmp_path):
    """The mean of the first steps, then an exponential average; it is validated, saved and returned."""
    steps = []

    def watched(model, images, labels):
        steps.append(model.classifier.bias.detach().clone())  # as the step before left it
        return cross_entropy(model, images, labels)

    recipe = replace(RECIPES["paper"], epochs=2, batch_size=30, lr=0.01)
    last = run(digits, tmp_path / "last.safetensors", recipe=recipe, defense=watched)
    expected = steps[1]
    for count, bias in enumerate([*steps[2:], last.classifier.bias], start=2):
        expected = expected.lerp(bias, max(0.25, 1 / count))
    assert count > 5

    output = tmp_path / "average.safetensors"
    kept = run(digits, output, recipe=replace(recipe, average=0.75), defense=watched)
    torch.testing.assert_close(kept.classifier.bias, expected)
    assert torch.equal(load_checkpoint(output).classifier.bias, kept.classifier.bias)
    validation = digits["validation"].first(60)
    assert read_metadata(output).validation_accuracy == accuracy(kept, validation)
    assert accuracy(kept, validation) != accuracy(last, validation)  # otherwise the line above would prove nothing
    for name, averaged in kept.state_dict().items():
        if name.endswith("running_mean"):  # batch norm's, averaged likewise
            assert not torch.allclose(averaged, last.state_dict()[name], rtol=1e-3)


def test_bfloat16_is_for_the_training_steps_alone(digits, tmp_path):
    """It is logged and resumed bit for bit; the loss, the weights and what is stored stay in float32."""
    seen = set()

    def defense(model, images, labels):
        loss = cross_entropy(model, images, labels)
        seen.add((model(images).dtype, loss.dtype))
        return loss

    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    run(digits, whole, precision="bfloat16", defense=defense)
    assert seen == {(torch.bfloat16, torch.float32)}
    assert {tensor.dtype for tensor in tensors_of(whole).values()} == {torch.float32, torch.int64}
    assert [epoch.precision for epoch in read_log(whole.with_suffix(".jsonl")).epochs] == ["bfloat16"] * 3
    assert read_metadata(whole).precision == "bfloat16"

    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "single.safetensors", defense=interrupted_after(8, defense))
    with pytest.raises(TrainingError, match=r"single.*was begun in float32, not in bfloat16: --precision"):
        run(digits, tmp_path / "single.safetensors", precision="bfloat16", defense=defense, resume=True)
    run(digits, tmp_path / "single.safetensors", defense=defense, resume=True)
    assert read_metadata(tmp_path / "single.safetensors").precision == "float32"
    assert not torch.equal(*(tensors_of(path)["classifier.bias"] for path in (whole, tmp_path / "single.safetensors")))

    with pytest.raises(KeyboardInterrupt):
        run(digits, halves, precision="bfloat16", defense=interrupted_after(8, defense))
    run(digits, halves, precision="bfloat16", defense=defense, resume=True)
    assert halves.read_bytes() == whole.read_bytes()


def test_run_of_other_processes_is_not_resumed(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "a.safetensors", defense=interrupted_after(8, cross_entropy))
    state = tmp_path / "a.partial.safetensors"
    header, tensors = read_tensors(state, RunState)
    write_tensors(state, tensors, replace(header, processes=8))
    with pytest.raises(
        TrainingError, match=r"a\.partial\.safetensors was begun by 8 processes: 1 cannot go on with it"
    ):
        run(digits, tmp_path / "a.safetensors", defense=cross_entropy, resume=True)


def test_run_killed_between_its_last_writes_can_be_resumed(digits, tmp_path, monkeypatch):
    output = tmp_path / "a.safetensors"
    run(digits, tmp_path / "whole.safetensors")
    monkeypatch.setattr("utils.runs.save_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(digits, output)
    monkeypatch.undo()
    run(digits, output, resume=True)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_temporary_files_of_a_killed_writer_go_with_the_partial_ones(digits, tmp_path, monkeypatch):
    """Killed while it wrote the last epoch's log: the state is there, and nothing remains to be trained."""
    output = tmp_path / "a.safetensors"
    monkeypatch.setattr("utils.runs.save_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(digits, output)
    monkeypatch.undo()
    for name in (".a.partial.jsonl.tmp", ".a.partial.safetensors.tmp"):
        (tmp_path / name).write_bytes(b"half")
    run(digits, output, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.safetensors"]


def test_earlier_checkpoint_stays_until_the_new_one_is_finished(digits, tmp_path):
    output = tmp_path / "a.safetensors"
    run(digits, output)
    before = output.read_bytes(), output.with_suffix(".jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(digits, output, seed=1, defense=interrupted_after(4))
    assert (output.read_bytes(), output.with_suffix(".jsonl").read_bytes()) == before


def test_another_run_is_not_resumed(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "a.safetensors", defense=interrupted_after(4, noisy))
    different = r"defense 'noisy', not None; label_smoothing 0\.0, not 0\.1; lr 0\.05, not 0\.1; seed 0, not 1"
    with pytest.raises(TrainingError, match=different):
        run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPE, lr=0.1), seed=1, resume=True)


@pytest.mark.parametrize("lost", ["network.", "optimizer.3.", "generator.batches"])
def test_state_that_lacks_something_is_named(lost, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "a.safetensors", defense=interrupted_after(4, noisy))
    state = tmp_path / "a.partial.safetensors"
    header, tensors = read_tensors(state, RunState)
    write_tensors(state, {name: t for name, t in tensors.items() if not name.startswith(lost)}, header)
    with pytest.raises(CheckpointError, match=r"a\.partial\.safetensors does not hold the state"):
        run(digits, tmp_path / "a.safetensors", defense=noisy, resume=True)


def test_defence_is_a_loss(digits, tmp_path):
    """It gets the training-mode network, float images in [0, 1] and labels; what it returns is minimised."""
    calls = []

    def defense(model, images, labels):
        in_range = (images.min() >= 0 and images.max() <= 1).item()
        calls.append((model.training, images.dtype, in_range, labels.dtype, len(images)))
        return F.cross_entropy(model(images), (labels + 1) % 10)

    recipe = replace(RECIPES["paper"], epochs=8, batch_size=30, lr=0.005)
    network = run(digits, tmp_path / "a.safetensors", recipe=recipe, defense=defense)
    assert {call[:4] for call in calls} == {(True, torch.float32, True, torch.int64)}
    assert sum(call[4] for call in calls) == 8 * 120
    with torch.no_grad():
        predicted = network(digits["train"].images[:120] / 255).argmax(1)
    assert (predicted == (digits["train"].labels[:120] + 1) % 10).float().mean() > 0.8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_size", [40, 5])  # noticed at the epoch's end, and when twenty losses are read
def test_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_epoch(bad, batch_size, digits, tmp_path):
    output, done, recipe = tmp_path / "a.safetensors", 0, replace(RECIPE, batch_size=batch_size)
    steps = 120 // batch_size

    def defense(model, images, labels):
        nonlocal done
        done += 1
        return cross_entropy(model, images, labels) * (bad if done == steps + 2 else 1)

    rate = recipe.lr_at((1 + 1 / steps) / recipe.epochs)
    with pytest.raises(
        TrainingError, match=rf"became {bad} in epoch 2, step 2 of {steps}, at a learning rate of {rate:.4g}; .*--lr"
    ):
        run(digits, output, recipe=recipe, defense=defense)
    assert done == steps + min(steps, 20)
    assert not output.exists()
    assert [line["epoch"] for line in log(output.with_suffix(".partial.jsonl"))[1:]] == [1]
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / "a.partial.safetensors", RunState)[1].values())


def test_weights_that_are_not_finite_are_not_saved(digits, tmp_path):
    """As a finite loss leaves them whose gradient is not, in an epoch's last step."""
    done = 0

    def defense(model, images, labels):
        nonlocal done
        done += 1
        loss = cross_entropy(model, images, labels)
        if done == 6:  # of the three in an epoch
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    with pytest.raises(TrainingError, match=r"the weights became NaN or infinite in epoch 2; a lower --lr"):
        run(digits, tmp_path / "a.safetensors", defense=defense)
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / "a.partial.safetensors", RunState)[1].values())


def test_one_cycle_rises_then_falls():
    recipe = replace(RECIPES["one-cycle"], lr=0.4, warmup=0.25)
    assert [recipe.lr_at(x) for x in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    assert {RECIPES["paper"].lr_at(x) for x in (0, 0.5, 0.999)} == {0.001}


def test_cross_entropy_is_smoothed_by_the_recipe(digits):
    logits, labels = torch.randn(4, 10), torch.randint(10, (4,))
    loss = cross_entropy(lambda _: logits, None, labels, label_smoothing=0.1)
    target = 0.9 * F.one_hot(labels, 10) + 0.01
    torch.testing.assert_close(loss, -(target * logits.log_softmax(1)).sum(1).mean())


def test_validation_images_are_not_learnt_from(digits, tmp_path):
    """The weights are the same whatever the validation images are."""
    reference = run(digits, tmp_path / "a.safetensors")
    other = {**digits, "validation": load_split("digits", "test")}
    network = run(other, tmp_path / "b.safetensors")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


def test_a_training_from_before_a_field_of_the_recipe_was_made_with_its_default(digits):
    wanted = training_arguments("cnn", digits["train"], RECIPE, width=4, seed=0)
    fields = {name: value for name, value in asdict(wanted).items() if name not in ("contrast", "average")}
    assert argument_differences(TrainingArguments(**fields), wanted) == []
    assert argument_differences(TrainingArguments(**fields), replace(wanted, contrast=0.5)) == ["contrast 1.0, not 0.5"]
    assert argument_differences(None, wanted)
    older = {"name": "n-fgsm", "epsilon": 0.1, "noise": 2.0}
    newer = replace(wanted, defense={**older, **USUAL_OPTIONS})
    assert argument_differences(replace(wanted, defense=older), newer) == []
    for name, value in (("crafting", "evaluation"), ("loss", "margin"), ("smoothing", 0.2)):
        assert argument_differences(
            replace(wanted, defense=older), replace(newer, defense={**newer.defense, name: value})
        )


# ---- the loop against a plain one ----


def plain_loop(network, training, recipe, seed):
    """The weights and the epochs' mean losses of a training that is written with torch alone, step by step."""
    generator, losses, average, step = torch.Generator().manual_seed(seed), [], None, 0
    steps = recipe.epochs * -(-len(training) // recipe.batch_size)
    options = {"lr": 1.0, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
    else:
        optimizer = torch.optim.Adam(network.parameters(), **options)
    flip = training.dataset == "cifar10"
    network.train()
    for _ in range(recipe.epochs):
        total = 0.0
        for images, labels in training_batches(
            training, recipe.batch_size, generator, flip=flip, shift=recipe.shift, contrast=recipe.contrast
        ):
            done = step / steps
            rising, falling = (
                (1, 1) if recipe.warmup is None else (done / recipe.warmup, (1 - done) / (1 - recipe.warmup))
            )
            optimizer.param_groups[0]["lr"] = recipe.lr * min(rising, falling)
            loss = F.cross_entropy(network(images), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
            step += 1
            average = weights if average is None else average.lerp(weights, max(1 - recipe.average, 1 / step))
            total += loss.item() * len(labels)
        losses.append(total / len(training))
    return average, losses


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])  # only CIFAR-10's images are mirrored
def test_training_takes_the_steps_of_a_plain_loop(dataset, optimizer, seed, digits, tmp_path):
    """Every number of the recipe matters here; the last batch is smaller than the others."""
    training = dataclasses.replace(digits["train"].first(50), dataset=dataset)
    recipe = Recipe(
        optimizer=optimizer,
        lr=0.05,
        warmup=0.4 if optimizer == "sgd" else None,
        epochs=2,
        batch_size=20,
        weight_decay=0.1,
        label_smoothing=0.3,
        shift=3,
        contrast=0.4,
        average=0.6 if optimizer == "adam" else 0.0,
    )
    output = tmp_path / "a.safetensors"
    options = {"width": 2, "seed": seed, "quiet": True}
    kept = train("small-cnn", training, digits["validation"].first(10), recipe, output=output, **options)
    torch.manual_seed(seed)
    network = NETWORKS["small-cnn"](2, 10, *training.channel_statistics())
    expected, losses = plain_loop(network.to(memory_format=torch.channels_last), training, recipe, seed)
    weights = torch.cat([parameter.flatten() for parameter in kept.parameters()])
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    assert [epoch.loss for epoch in read_log(tmp_path / "a.jsonl").epochs] == pytest.approx(losses, rel=1e-5)


def test_best_epoch_is_kept(digits, tmp_path, monkeypatch):
    """That of the highest accuracy on the images that choose, whatever the others say."""
    seen = []

    def validated(self, network):
        seen.append(network.classifier.bias.detach().clone())
        return {"robust_accuracy": 0.1 * len(seen), "choosing_accuracy": (0.3, 0.5, 0.4)[len(seen) - 1]}

    def defense(model, images, labels):
        return cross_entropy(model, images, labels)

    defense.epsilon = 0.1
    monkeypatch.setattr(RobustValidation, "__call__", validated)
    kept = run(digits, tmp_path / "a.safetensors", defense=defense)
    assert torch.equal(kept.classifier.bias, seen[1])
    assert not torch.equal(kept.classifier.bias, seen[2])
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert (metadata.epochs, metadata.robust_accuracy, metadata.choosing_accuracy) == (2, 0.2, 0.5)


# ---- Ctrl-C ----


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0), (2, 0), (3, 1), (8, 2)])
def test_interrupt_says_how_many_epochs_are_saved(steps, epochs, digits, tmp_path):
    with pytest.raises(Interrupted) as interrupt:
        run(digits, tmp_path / "a.safetensors", defense=interrupted_after(steps))
    assert interrupt.value.saved_epochs == epochs
    assert str(interrupt.value) == ("no epoch is saved", "1 epoch is saved", "2 epochs are saved")[epochs]
    assert PartialRun(tmp_path / "a.safetensors").exists() == (epochs > 0)
    if epochs:
        with pytest.raises(Interrupted) as interrupt:
            run(digits, tmp_path / "a.safetensors", defense=interrupted_after(1), resume=True)
        assert interrupt.value.saved_epochs == epochs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("write", range(1, 7))  # two an epoch, of the state and of the log
def test_interrupt_in_a_write_loses_no_saved_epoch(write, when, digits, tmp_path, monkeypatch):
    """Ctrl-C comes just before, or just after, the new file takes the old one's place."""
    replaced, writes = os.replace, []

    def interrupted(*paths):
        writes.append(paths)
        if len(writes) != write or when == "after":
            replaced(*paths)
        if len(writes) == write:
            raise KeyboardInterrupt

    run(digits, tmp_path / "whole.safetensors", defense=noisy)
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(Interrupted) as interrupt:
        run(digits, tmp_path / "a.safetensors", defense=noisy)
    monkeypatch.undo()
    run_of_a = PartialRun(tmp_path / "a.safetensors")
    saved = len(run_of_a.header().epochs) if run_of_a.exists() else 0
    assert saved == interrupt.value.saved_epochs == (write + (when == "after")) // 2
    assert not list(tmp_path.glob(".*"))
    run(digits, tmp_path / "a.safetensors", defense=noisy, resume=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


# ---- what is recorded ----


@dataclasses.dataclass
class Weighted:
    """A defence of somebody else: it has no name, and a field that no file can hold."""

    strength: float
    network: object = None

    def __call__(self, model, images, labels):
        return self.strength * cross_entropy(model, images, labels)


@dataclasses.dataclass
class Radius:
    """A defence with a radius, such as somebody may write."""

    epsilon: object

    def __call__(self, model, images, labels):
        return cross_entropy(model, images, labels)


class Module(torch.nn.Module):
    def forward(self, model, images, labels):
        return cross_entropy(model, images, labels)


class Plain:
    name = 3  # not a name

    def __call__(self, model, images, labels):
        return cross_entropy(model, images, labels)


DEFENSES = {
    "function": (noisy, "noisy"),
    "lambda": (lambda *arguments: cross_entropy(*arguments), "<lambda>"),
    "partial": (
        functools.partial(cross_entropy, label_smoothing=0.2),
        {"name": "cross_entropy", "label_smoothing": 0.2},
    ),
    "partial without keywords": (functools.partial(noisy), "noisy"),
    "partial with positional arguments": (
        functools.partial(lambda scale, *batch: scale * cross_entropy(*batch), 2.0),
        {"name": "<lambda>", "argument 0": 2.0},
    ),
    "partial of a dataclass": (
        functools.partial(PGD(0.1, steps=2)),
        {"name": "pgd", "epsilon": 0.1, "steps": 2, **USUAL_OPTIONS},
    ),
    "numbers of NumPy and torch": (
        Weighted(numpy.float32(0.5), torch.tensor(2)),
        {"name": "Weighted", "strength": 0.5, "network": 2},
    ),
    "dataclass with a tensor": (
        Weighted(0.5, torch.ones(3)),
        {"name": "Weighted", "strength": 0.5, "network": "Tensor"},
    ),
    "module": (Module(), "Module"),
    "instance": (Plain(), "Plain"),
    "dataclass": (Weighted(0.5, Module()), {"name": "Weighted", "strength": 0.5, "network": "Module"}),
    "dataclass with a name": (
        PGD(0.1, steps=2),
        {"name": "pgd", "epsilon": 0.1, "steps": 2, **USUAL_OPTIONS},
    ),
}


@pytest.mark.parametrize("kind", DEFENSES)
def test_any_callable_is_a_defence_and_described(kind, digits, tmp_path):
    defense, expected = DEFENSES[kind]
    assert described(defense) == expected
    run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPE, epochs=1), defense=defense)
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert metadata.training.defense == expected
    assert metadata.training.label_smoothing == 0  # the recipe's is 0.1, and the defence ignores it


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_defence_whose_numbers_no_file_can_hold_is_described(strength):
    assert described(Weighted(strength)) == {"name": "Weighted", "strength": "float", "network": None}


@pytest.mark.parametrize("epsilon", [-1.0, "8/255", float("nan")])
def test_defence_with_an_impossible_radius_is_refused_in_one_line(epsilon, digits, tmp_path):
    with pytest.raises(TrainingError, match="not valid: epsilon") as refused:
        run(digits, tmp_path / "a.safetensors", defense=Radius(epsilon))
    assert "\n" not in str(refused.value)


def test_output_that_is_a_folder_is_refused_before_the_first_step(digits, tmp_path):
    with pytest.raises(TrainingError, match="is a folder"):
        run(digits, tmp_path, defense=interrupted_after(0))
    assert not list(tmp_path.iterdir())


def test_header_that_would_grow_too_long_is_refused_before_the_first_step(digits, tmp_path):
    names = [f"{number:0200}" for number in range(CheckpointHeader.longest // 204 - 2)]  # each takes 204 bytes of JSON
    many = {name: dataclasses.replace(split, class_names=tuple(names)) for name, split in digits.items()}
    check_saveable(CNN(4, len(names)), {"dataset": "digits", "class_names": names})  # without results they just fit
    with pytest.raises(CheckpointError, match="longer than"):
        run(many, tmp_path / "a.safetensors", defense=interrupted_after(0))


def test_outputs_whose_names_end_in_numbers_do_not_share_files(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "net-0.2", defense=interrupted_after(4))
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "net-0.3", defense=interrupted_after(7))
    assert [len(PartialRun(tmp_path / name).header().epochs) for name in ("net-0.2", "net-0.3")] == [1, 2]
    run(digits, tmp_path / "net-0.2", defense=cross_entropy, resume=True)
    assert read_log(tmp_path / "net-0.2.jsonl").arguments.defense == "cross_entropy"
    assert PartialRun(tmp_path / "net-0.3").exists()


@pytest.mark.parametrize("factor", [1e300, 1e38, -1e12])
def test_mean_loss_that_no_log_can_hold_is_one_error_and_nothing_is_written(factor, digits, tmp_path):
    """Each loss is finite; of 1e38, the float32 sum over the images is not."""

    def defense(model, images, labels):
        loss = cross_entropy(model, images, labels)
        return loss + loss.detach().double().mul(0).add(factor).to(torch.float64 if factor == 1e300 else torch.float32)

    with pytest.raises(TrainingError, match=r"^the mean loss of epoch 1 became -?(inf|1e\+12), beyond 1e\+09; .* --lr"):
        run(digits, tmp_path / "a.safetensors", defense=defense)
    assert not list(tmp_path.iterdir())


def test_clock_that_is_set_back_does_not_stop_a_training(digits, tmp_path, monkeypatch):
    times = itertools.count(1000, -1)
    monkeypatch.setattr("utils.training.time.perf_counter", lambda: next(times))
    run(digits, tmp_path / "a.safetensors")
    assert all(epoch.seconds == 0 for epoch in read_log(tmp_path / "a.jsonl").epochs)


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (tuple(map(str, range(20_000))), "num_classes"),
        (tuple(range(10)), "class_names"),
        (("",) * 10, "class_names"),
    ],
)
def test_classes_that_no_checkpoint_can_hold_are_refused_before_the_first_step(class_names, message, digits, tmp_path):
    training = dataclasses.replace(digits["train"].first(40), class_names=class_names)
    with pytest.raises(UserError, match=message) as error:
        train(
            "cnn", training, training, RECIPE, output=tmp_path / "a", width=1, defense=lambda *_: pytest.fail("a step")
        )
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_network_of_many_classes_trains_saves_and_loads(digits, tmp_path):
    names = tuple(f"class {i}" for i in range(257))
    training = dataclasses.replace(digits["train"].first(40), class_names=names)
    train("cnn", training, training, replace(RECIPE, epochs=1), output=tmp_path / "a.safetensors", width=1, quiet=True)
    assert load_checkpoint(tmp_path / "a.safetensors").classifier.bias.shape == (257,)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
def test_default_dtype_of_float64_is_refused_in_one_line(digits, tmp_path):
    with pytest.raises(UserError, match="float64") as error:
        run(digits, tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"), [({"epochs": 0}, "epochs"), ({"lr": float("nan")}, ""), ({"batch_size": 0}, "batch_size")]
)
def test_recipe_out_of_bounds_is_refused(changes, named, digits, tmp_path):
    with pytest.raises(TrainingError, match=f"these training arguments are not valid: .*{named}"):
        run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPE, **changes))


def test_run_of_thousands_of_epochs_is_resumed(digits, tmp_path):
    recipe = replace(RECIPE, epochs=3001)
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "a.safetensors", recipe=recipe, defense=interrupted_after(3, cross_entropy))
    partial = PartialRun(tmp_path / "a.safetensors")
    header, tensors = read_tensors(partial.state, RunState)
    epochs = [replace(header.epochs[0], epoch=epoch) for epoch in range(1, 3001)]
    write_tensors(partial.state, tensors, replace(header, epochs=epochs))
    assert len(partial.header().epochs) == 3000
    run(digits, tmp_path / "a.safetensors", recipe=recipe, defense=cross_entropy, resume=True)
    assert len(read_log(tmp_path / "a.jsonl").epochs) == 3001


# ---- small splits ----


@pytest.mark.parametrize("empty", ["training", "validation"])
@pytest.mark.parametrize("defense", [None, FGSM(0.1)])
def test_empty_split_is_one_clear_line(empty, defense, digits, tmp_path):
    splits = [digits[name].first(0 if name.startswith(empty[:5]) else 40) for name in ("train", "validation")]
    with pytest.raises(TrainingError, match=f"^the {empty} split has no images$"):
        train("cnn", *splits, RECIPE, output=tmp_path / "a.safetensors", defense=defense)
    assert not list(tmp_path.iterdir())


def test_precision_is_one_of_two(digits, tmp_path):
    with pytest.raises(ValueError, match="precision"):
        run(digits, tmp_path / "a.safetensors", precision="float16")
    with pytest.raises(TypeError, match="learning_rate"):
        run(digits, tmp_path / "a.safetensors", learning_rate=1)


# ---- logs ----


def test_log_is_read_as_it_was_written_and_anything_else_is_refused(digits, tmp_path):
    run(digits, tmp_path / "a.safetensors", seed=4)
    path = tmp_path / "a.jsonl"
    arguments, epochs = read_log(path)
    assert (arguments.seed, arguments.network, arguments.processes) == (4, "cnn", 1)
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    with pytest.raises(TrainingError, match=r"a\.jsonl is not a training log \(an epoch lacks robust_accuracy\)"):
        read_log(path, "robust_accuracy")
    first, *lines = path.read_text().splitlines()
    for content in ("", "nonsense", first, "\n".join([first, *lines, lines[0][:-5]])):
        path.write_text(content)
        with pytest.raises(TrainingError, match=r"a\.jsonl is not a training log"):
            read_log(path)
        assert read_epochs(tmp_path / "a.safetensors") == []
    path.write_text("")
    with pytest.raises(TrainingError, match=r"a\.jsonl is not a training log \(it is empty\)"):
        read_log(path)


@pytest.mark.parametrize("name", ["a.partial.safetensors", "a.jsonl", "a.partial.jsonl"])
def test_a_file_that_no_training_made_is_neither_replaced_nor_removed(name, digits, tmp_path):
    """A checkpoint that its owner has called like a state, and texts that are not logs."""
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_checkpoint(path, CNN(width=1), {"dataset": "digits", "class_names": list("0123456789")})
    else:
        path.write_text("somebody's\n")
    before = path.read_bytes()
    splits = digits["train"].first(8), digits["validation"].first(8)
    for resume in (False, True):
        with pytest.raises(TrainingError, match=f"{name} is not of a training, and this run would replace it"):
            train("cnn", *splits, RECIPES["paper"], output=tmp_path / "a.safetensors", width=1, resume=resume)
    assert (path.read_bytes(), [*tmp_path.iterdir()]) == (before, [path])


@pytest.mark.parametrize("quiet", [False, True])
def test_each_epoch_is_printed_unless_quiet(quiet, digits, tmp_path, capsys):
    output = tmp_path / "a.safetensors"
    training, validation = (digits[name].first(60) for name in ("train", "validation"))
    train("cnn", training, validation, replace(RECIPE, epochs=2), output=output, width=1, quiet=quiet)
    lines = [f"epoch {e.epoch}/2  loss {e.loss:.4f}  validation" for e in read_log(output.with_suffix(".jsonl")).epochs]
    printed = [line.partition(" accuracy")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ([] if quiet else lines)


def test_a_training_starts_from_the_weights_of_a_checkpoint(digits, tmp_path):
    recipe = replace(RECIPE, epochs=1, lr=1e-9, weight_decay=0)
    first = run(digits, tmp_path / "first.safetensors", seed=1, recipe=replace(recipe, lr=0.1))
    second = run(digits, tmp_path / "second.safetensors", seed=2, recipe=recipe, init=tmp_path / "first.safetensors")
    torch.testing.assert_close(dict(second.named_parameters()), dict(first.named_parameters()), rtol=0, atol=1e-6)


def test_a_network_is_as_wide_as_the_studys_unless_told(digits, tmp_path):
    training = digits["train"].first(20)
    train("cnn", training, training, replace(RECIPE, epochs=1), output=tmp_path / "a.safetensors", quiet=True)
    assert read_metadata(tmp_path / "a.safetensors").arguments.width == 32
