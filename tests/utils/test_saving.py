"""Saved adversarial examples: within the ball after rounding, verified through the network, and read again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from attacks import pgd
from utils.constants import UserError
from utils.data import batches, to_unit_range
from utils.evaluation import evaluate
from utils.images import as_split
from utils.saving import load_images, round_within, save_images

EPSILON = 8 / 255


def subject(channels=3, count=30, size=12, floating=False):
    """A random network, and images with the labels that it gives to most of them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (size - 2) ** 2, 5))
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    images = (images / 255 + torch.rand(1) / 1000).clamp(0, 1) if floating else images
    ((pixels, _),) = batches(as_split((images, torch.zeros(count).long())), count)
    labels = network(pixels).argmax(1)
    labels[::7] = (labels[::7] + 1) % 5
    return network, as_split((images, labels), network)


def saved_by_pgd(folder, network, split, batch_size=8):
    crafted = []
    result = evaluate(network, split, "pgd", EPSILON, batch_size=batch_size, on_batch=crafted.append)
    about = {"attack": "pgd", "epsilon": EPSILON, "iterations": 20, "batch_size": batch_size}
    return result, save_images(folder, network, split, crafted, **about)


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_pictures_give_exactly_the_reported_accuracy(channels, tmp_path):
    """Pillow reads them, and the network classifies them in batches of the same size."""
    network, split = subject(channels)
    result, saved = saved_by_pgd(tmp_path, network, split)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adversarial",
        "contact-sheet.png",
        "images.jsonl",
        "originals",
    ]
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    files = {part: [tmp_path / part / line["file"] for line in lines[1:]] for part in ("adversarial", "originals")}
    pixels = {}
    for part, paths in files.items():
        arrays = [np.array(Image.open(path)).reshape(12, 12, channels) for path in paths]
        pixels[part] = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        answers = torch.cat([network(batch / 255).argmax(1) for batch in pixels[part].split(8)])
        assert answers.tolist() == [line["after" if part == "adversarial" else "before"] for line in lines[1:]]
        right = (answers == split.labels).double().mean().item()
        assert right == lines[0]["accuracy" if part == "adversarial" else "clean_accuracy"]
    assert torch.equal(pixels["originals"], split.images)
    difference = (pixels["adversarial"].double() - pixels["originals"].double()).flatten(1) / 255
    assert [line["linf"] for line in lines[1:]] == difference.abs().amax(1).tolist()
    assert [line["l2"] for line in lines[1:]] == pytest.approx(difference.norm(dim=1).tolist())
    assert max(line["linf"] for line in lines[1:]) == 8 / 255
    assert lines[0]["misclassified"] == int((~result.mask).sum()) > 0
    assert 0 < lines[0]["survived"] <= lines[0]["misclassified"]
    assert saved.header.accuracy == lines[0]["accuracy"]


def test_what_was_saved_is_loaded_with_one_call(tmp_path):
    network, split = subject()
    _, saved = saved_by_pgd(tmp_path / "deep" / "folder", network, split)
    loaded = load_images(tmp_path / "deep" / "folder")
    assert (loaded.header, loaded.images) == (saved.header, saved.images)
    for part in ("adversarial", "originals"):
        one, other = getattr(loaded, part), getattr(saved, part)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.class_names == other.class_names
    again = evaluate(network, loaded.adversarial, "fgsm", 0, batch_size=8)
    assert again.accuracy == saved.header.accuracy


def test_the_contact_sheet_is_a_picture(tmp_path):
    saved_by_pgd(tmp_path, *subject())
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.mode == "RGB"
        assert min(sheet.size) > 200


@given(
    st.lists(st.tuples(st.integers(0, 255), st.floats(-1, 1)), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.5 / 255, 1 / 255, 0.005, 0.02, 8 / 255, 0.1, 1.0]),
)
def test_rounding_never_leaves_the_ball_around_an_8_bit_image(pixels, epsilon):
    originals = torch.tensor([level for level, _ in pixels], dtype=torch.uint8)
    exact = to_unit_range(originals[None, None, None])
    moved = (exact + epsilon * torch.tensor([move for _, move in pixels])).clamp(0, 1)
    rounded = round_within(moved, exact, epsilon)
    assert rounded.dtype == torch.uint8
    levels = (rounded.double() - originals).abs()
    assert levels.max() <= 255 * epsilon + 1e-9
    nearest = (moved.double() * 255 - rounded).abs()
    assert (nearest <= 0.5 + 1e-3).logical_or(levels >= int(255 * epsilon + 1e-9)).all()


def test_rounding_stays_in_the_l2_ball_and_is_the_nearest_where_that_stays_in_it():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (40, 3, 6, 6), generator=generator).double()
    offset = torch.randn(originals.shape, generator=generator).double()
    offset *= torch.linspace(0.1, 1, 40).view(-1, 1, 1, 1).double() / offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = (originals / 255 + offset).clamp(0, 1)
    epsilons = (moved - originals / 255).flatten(1).norm(dim=1)
    kept = 0
    for i, epsilon in enumerate(epsilons.tolist()):
        (rounded,) = round_within(moved[i : i + 1], originals[i : i + 1] / 255, epsilon, "l2").double()
        assert (rounded - originals[i]).norm() <= 255 * epsilon
        assert (rounded - moved[i] * 255).abs().max() < 1
        nearest = (moved[i] * 255).round()
        if (nearest - originals[i]).norm() <= 255 * epsilon:
            assert torch.equal(rounded, nearest)
            kept += 1
    assert 0 < kept < 40


def test_examples_of_an_l2_attack_are_saved_within_its_ball(tmp_path):
    network, split = subject()
    crafted, options = [], {"norm": "l2", "early_stop": False}
    evaluate(network, split, "pgd", 0.4, options=options, on_batch=crafted.append)
    saved = save_images(tmp_path, network, split, crafted, attack="pgd", epsilon=0.4, norm="l2")
    assert max(image.l2 for image in saved.images) <= 0.4 + 1e-6
    assert max(image.linf for image in saved.images) > 0.02
    assert load_images(tmp_path).header.norm == "l2"


def test_images_that_are_not_8_bit_are_saved_within_the_ball_too(tmp_path):
    network, split = subject(floating=True)
    _, saved = saved_by_pgd(tmp_path, network, split)
    assert max(image.linf for image in saved.images) <= EPSILON + 1e-6
    assert load_images(tmp_path).header == saved.header


def test_a_class_may_have_a_long_name(tmp_path):
    network, split = subject(count=4)
    named = replace(split, class_names=("n" * 250, *split.class_names[1:]))
    about = {"attack": "pgd", "epsilon": EPSILON}
    saved = save_images(tmp_path / "a", network, named, to_unit_range(named.images), **about)
    assert saved.header.class_names == ["n" * 200, "1", "2", "3", "4"]
    too_many = replace(split, class_names=("n" * 200,) * 9000)
    with pytest.raises(UserError, match=r"these examples cannot be saved: .* longer than 1,048,576 bytes"):
        save_images(tmp_path / "b", network, too_many, to_unit_range(split.images), **about)


def test_what_cannot_be_saved_is_one_line(tmp_path):
    network, split = subject()
    crafted = pgd(network, to_unit_range(split.images), split.labels, epsilon=0.1)
    about = {"attack": "pgd", "epsilon": 0.1}
    with pytest.raises(UserError, match="must have the shape of the originals"):
        save_images(tmp_path, network, split, crafted[1:], **about)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        save_images(tmp_path, network, split, crafted, **about)
    with pytest.raises(UserError, match="cannot be written"):
        save_images(tmp_path / "mine.txt" / "a", network, split, crafted, **about)
    images, labels = torch.rand(4, 2, 12, 12), torch.zeros(4).long()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(288, 5))
    with pytest.raises(UserError, match="1 or 3 channels"):
        save_images(tmp_path / "a", flat, (images, labels), images, **about)


def test_names_and_numbers_that_do_not_fit_leave_the_folder_empty(tmp_path):
    network, split = subject()
    images = to_unit_range(split.images)
    named = replace(split, class_names=("", "b", "c", "d", "e"))
    for of, about in ((named, {}), (split, {"attack": ""}), (split, {"iterations": -1})):
        with pytest.raises(UserError, match="these examples cannot be saved"):
            save_images(tmp_path, network, of, images, **({"attack": "pgd", "epsilon": 0.1} | about))
    with pytest.raises(ValueError, match="did you mean 8/255"):
        save_images(tmp_path, network, split, images, attack="pgd", epsilon=8)
    with pytest.raises(ValueError, match="norm must be one of"):
        save_images(tmp_path, network, split, images, attack="pgd", epsilon=0.1, norm="l1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_network_of_another_precision_classifies_what_was_saved(dtype, tmp_path):
    network, split = subject(floating=True)
    network, split = network.to(dtype), replace(split, images=split.images.to(dtype))
    _, saved = saved_by_pgd(tmp_path, network, split)
    pixels = [np.array(Image.open(path)) for path in sorted((tmp_path / "adversarial").iterdir())]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(dtype) / 255
    answers = torch.cat([network(batch.contiguous()).argmax(1) for batch in images.split(8)])
    assert saved.header.accuracy == (answers == split.labels).double().mean().item() < 0.9


def test_a_damaged_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"images\.jsonl cannot be read"):
        load_images(tmp_path)
    network, split = subject(count=3)
    saved_by_pgd(tmp_path, network, split)
    (tmp_path / "adversarial" / "00001.png").unlink()
    with pytest.raises(UserError, match=r"00001\.png cannot be read"):
        load_images(tmp_path)
    for text in ("", "{}\n", "[]"):
        (tmp_path / "images.jsonl").write_text(text)
        with pytest.raises(UserError, match="does not describe saved images"):
            load_images(tmp_path)
