"""The training loop: it learns, repeats itself bit for bit, and loses nothing when it is interrupted."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace

from utils.checkpoints import CheckpointError, load_checkpoint, read_metadata, read_tensors, write_tensors
from utils.data import load_split
from utils.evaluation import accuracy
from utils.recipes import RECIPES, Recipe
from utils.runs import TrainingError, argument_differences, training_arguments
from utils.training import cross_entropy, train

RECIPE = replace(RECIPES["one-cycle"], epochs=3, lr=0.05)


def run(digits, output, name="cnn", recipe=RECIPE, **options):
    training = digits["train"].first(300)
    return train(name, training, digits["validation"], recipe, output=output, width=4, quiet=True, **options)


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
    assert metadata["validation_accuracy"] > 0.85
    network = load_checkpoint(trained(name))
    validation = digits["validation"]
    with torch.no_grad():
        predicted = network(validation.images / 255).argmax(1)
    assert (predicted == validation.labels).float().mean().item() == pytest.approx(metadata["validation_accuracy"])


def test_checkpoint_says_how_it_was_made(digits, tmp_path):
    run(digits, tmp_path / "a.safetensors", seed=5)
    metadata = read_metadata(tmp_path / "a.safetensors")
    lines = log(tmp_path / "a.jsonl")
    assert metadata["dataset"] == "digits"
    assert metadata["class_names"] == list("0123456789")
    assert metadata["training"]["seed"] == 5
    assert metadata["training"]["lr"] == 0.05
    assert metadata["epochs"] == 3
    assert metadata["validation_accuracy"] == lines[-1]["validation_accuracy"]
    assert lines[0].items() >= metadata["training"].items()
    assert [line["epoch"] for line in lines[1:]] == [1, 2, 3]


def test_normalisation_comes_from_the_training_images(digits, tmp_path):
    network = run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPE, epochs=1))
    mean, std = digits["train"].first(300).channel_statistics()
    torch.testing.assert_close(network.normalize.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(network.normalize.std.flatten(), torch.tensor(std))


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


@pytest.mark.parametrize("name", ["cnn", "cnn-lstm"])
@pytest.mark.parametrize(("recipe", "average"), [("one-cycle", 0.0), ("paper", 0.9)])
@pytest.mark.parametrize("steps", [1, 5, 8])  # in the first epoch, in the second, in the third
def test_resumed_run_ends_bit_identical(name, recipe, average, steps, digits, tmp_path):
    recipe = replace(RECIPES[recipe], epochs=3, batch_size=100, average=average)
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


def test_moving_average_of_the_weights_is_what_is_kept(digits, tmp_path):
    """The mean of the first steps, then an exponential average; it is validated, saved and returned."""
    steps = []

    def watched(model, images, labels):
        steps.append(model.classifier.bias.detach().clone())  # as the step before left it
        return cross_entropy(model, images, labels)

    recipe = replace(RECIPES["paper"], epochs=2, batch_size=60, lr=0.01)
    last = run(digits, tmp_path / "last.safetensors", recipe=recipe, defense=watched)
    expected = steps[1]
    for count, bias in enumerate([*steps[2:], last.classifier.bias], start=2):
        expected = expected.lerp(bias, max(0.25, 1 / count))
    assert count > 5

    output = tmp_path / "average.safetensors"
    kept = run(digits, output, recipe=replace(recipe, average=0.75), defense=watched)
    torch.testing.assert_close(kept.classifier.bias, expected)
    assert torch.equal(load_checkpoint(output).classifier.bias, kept.classifier.bias)
    assert read_metadata(output)["validation_accuracy"] == accuracy(kept, digits["validation"])
    assert accuracy(kept, digits["validation"]) != accuracy(last, digits["validation"])  # else that would say nothing
    for name, averaged in kept.state_dict().items():
        if name.endswith("running_mean"):  # batch norm's, averaged likewise
            assert not torch.allclose(averaged, last.state_dict()[name], rtol=1e-3)


def test_bfloat16_is_for_the_training_steps_alone(digits, tmp_path):
    """It learns, is logged and resumed bit for bit; the loss, the weights and what is stored stay in float32."""
    seen = set()

    def defense(model, images, labels):
        loss = cross_entropy(model, images, labels)
        seen.add((model(images).dtype, loss.dtype))
        return loss

    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    run(digits, whole, precision="bfloat16", defense=defense)
    assert seen == {(torch.bfloat16, torch.float32)}
    assert {tensor.dtype for tensor in read_tensors(whole)[1].values()} == {torch.float32, torch.int64}
    assert [line["precision"] for line in log(whole.with_suffix(".jsonl"))[1:]] == ["bfloat16"] * 3
    assert read_metadata(whole)["precision"] == "bfloat16"
    assert read_metadata(whole)["validation_accuracy"] > 0.5

    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "single.safetensors", defense=interrupted_after(8, defense))
    with pytest.raises(TrainingError, match=r"single.*was begun in float32, not in bfloat16: --precision"):
        run(digits, tmp_path / "single.safetensors", precision="bfloat16", defense=defense, resume=True)
    run(digits, tmp_path / "single.safetensors", defense=defense, resume=True)
    assert read_metadata(tmp_path / "single.safetensors")["precision"] == "float32"
    assert not torch.equal(*(read_tensors(p)[1]["classifier.bias"] for p in (whole, tmp_path / "single.safetensors")))

    with pytest.raises(KeyboardInterrupt):
        run(digits, halves, precision="bfloat16", defense=interrupted_after(8, defense))
    run(digits, halves, precision="bfloat16", defense=defense, resume=True)
    assert halves.read_bytes() == whole.read_bytes()


def test_run_of_other_processes_is_not_resumed(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "a.safetensors", defense=interrupted_after(8, cross_entropy))
    state = tmp_path / "a.partial.safetensors"
    metadata, tensors = read_tensors(state)
    write_tensors(state, tensors, {**metadata, "processes": 8})
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
    with pytest.raises(TrainingError, match=r"defense 'noisy', not None; lr 0\.05, not 0\.1; seed 0, not 1"):
        run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPE, lr=0.1), seed=1, resume=True)


@pytest.mark.parametrize("lost", ["network.", "optimizer.3.", "generator.batches"])
def test_state_that_lacks_something_is_named(lost, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path / "a.safetensors", defense=interrupted_after(4, noisy))
    state = tmp_path / "a.partial.safetensors"
    metadata, tensors = read_tensors(state)
    write_tensors(state, {name: t for name, t in tensors.items() if not name.startswith(lost)}, metadata)
    with pytest.raises(CheckpointError, match=r"a\.partial\.safetensors does not hold the state"):
        run(digits, tmp_path / "a.safetensors", defense=noisy, resume=True)


def test_defence_is_a_loss(digits, tmp_path):
    """It gets the training-mode network, float images in [0, 1] and labels; what it returns is minimised."""
    calls = []

    def defense(model, images, labels):
        in_range = (images.min() >= 0 and images.max() <= 1).item()
        calls.append((model.training, images.dtype, in_range, labels.dtype, len(images)))
        return F.cross_entropy(model(images), (labels + 1) % 10)

    network = run(digits, tmp_path / "a.safetensors", recipe=replace(RECIPES["paper"], epochs=8), defense=defense)
    assert {call[:4] for call in calls} == {(True, torch.float32, True, torch.int64)}
    assert sum(call[4] for call in calls) == 8 * 300
    with torch.no_grad():
        predicted = network(digits["train"].images[:300] / 255).argmax(1)
    assert (predicted == (digits["train"].labels[:300] + 1) % 10).float().mean() > 0.8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_size", [128, 5])  # noticed at the epoch's end, and after the twenty steps that are read
def test_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_epoch(bad, batch_size, digits, tmp_path):
    output, done, recipe = tmp_path / "a.safetensors", 0, replace(RECIPE, batch_size=batch_size)
    steps = -(-300 // batch_size)

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
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / "a.partial.safetensors")[1].values())


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
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / "a.partial.safetensors")[1].values())


def test_one_cycle_rises_then_falls():
    recipe = Recipe("sgd", 0.4, 0.25, 1, 1, 0, 0, 0)
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
    older = {name: value for name, value in wanted.items() if name != "contrast"}
    assert argument_differences(older, wanted) == []
    assert argument_differences(older, {**wanted, "contrast": 0.5}) == ["contrast 1.0, not 0.5"]
    assert argument_differences(None, wanted)
    defended = {**wanted, "defense": {"name": "n-fgsm", "epsilon": 0.1, "noise": 2.0, "crafting": "training"}}
    older = {**wanted, "defense": {"name": "n-fgsm", "epsilon": 0.1, "noise": 2.0}}
    assert argument_differences(older, defended) == []
