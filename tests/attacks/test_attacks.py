"""What every attack promises, over a table of attacks, models, dtypes, memory formats and sizes."""

import copy
import functools
import itertools
import warnings
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import fgsm, multi_targeted, pgd, strong
from attacks.core import attacking, input_gradient
from networks import CNN, CNNLSTM, SmallCNN
from tests.helpers.attacked import TinyLSTM, model_and_images

EPSILONS = [0, 1e-4, 1 / 255, Fraction(8, 255), 0.1, 0.9, 1]

ATTACKS = {
    "fgsm": fgsm,
    "targeted fgsm": functools.partial(fgsm, targeted=True),
    "pgd": functools.partial(pgd, steps=3),
    "pgd from the image": functools.partial(pgd, steps=2, random_start=False),
    "pgd, margin, restarts": functools.partial(pgd, steps=2, loss="margin", restarts=2),
    "targeted pgd": functools.partial(pgd, steps=3, targeted=True),
    "multi-targeted pgd": functools.partial(multi_targeted, steps=2),
    "fgsm, l2": functools.partial(fgsm, norm="l2"),
    "pgd, l2": functools.partial(pgd, norm="l2", steps=3),
    "pgd, momentum": functools.partial(pgd, momentum=1, steps=3),
    "targeted pgd, l2, momentum": functools.partial(pgd, norm="l2", momentum=1, steps=2, targeted=True),
    "strong, l2": functools.partial(strong, norm="l2", steps=2),
}


@pytest.fixture(params=ATTACKS.values(), ids=ATTACKS)
def attack(request):
    return request.param


def norm_of(attack):
    return getattr(attack, "keywords", {}).get("norm", "linf")


# ---- the promises about the result ----

MODELS = {
    "linear": lambda: model_and_images("linear", size=32)[0],
    "convolution, batch norm, dropout": lambda: model_and_images("cnn", size=32)[0],
    "lstm": TinyLSTM,
    "CNN": lambda: CNN(width=4),
    "CNNLSTM": lambda: CNNLSTM(width=4),
    "SmallCNN": lambda: SmallCNN(width=4),
    "one that computes in float32": lambda: InFloat32(),
}


class InFloat32(torch.nn.Module):
    """A network that answers in float32 whatever it is asked in."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 32 * 32, 10)

    def to(self, *dtype):
        return self

    def forward(self, images):
        return self.linear(images.float().flatten(1))


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
# Every fifth is enough: no number of choices is a multiple of five, so all pairs of choices are among them.
COMBINATIONS = list(itertools.product(MODELS, DTYPES, FORMATS, (0, 1, 3)))[::5]


@pytest.mark.parametrize(("name", "dtype", "memory_format", "count"), COMBINATIONS, ids=str)
def test_result_is_close_valid_and_typed_as_the_images(name, dtype, memory_format, count, attack):
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    # Multiples of 1/255, with both ends of the range, as real images have them.
    images = (torch.randint(0, 256, (count, 3, 32, 32)) / 255).to(dtype, memory_format=memory_format)
    labels = torch.randint(10, (count,))
    for epsilon in EPSILONS:
        adversarial = attack(model, images, labels, epsilon=epsilon)
        assert (adversarial.shape, adversarial.dtype, adversarial.device) == (images.shape, dtype, images.device)
        assert not adversarial.requires_grad
        if epsilon == 0:
            assert torch.equal(adversarial, images)
        if count:
            assert adversarial.is_contiguous(memory_format=memory_format)
            assert adversarial.min() >= 0
            assert adversarial.max() <= 1
            offset = (adversarial.double() - images.double()).flatten(1)
            if norm_of(attack) == "linf":
                assert offset.abs().max() <= epsilon + torch.finfo(dtype).eps
            else:  # each pixel is rounded
                assert offset.norm(dim=1).max() <= epsilon * (1 + 1e-5) + torch.finfo(dtype).eps * 3072**0.5 / 2


def test_epsilon_zero_returns_the_images_bit_for_bit_and_not_the_same_tensor(attack):
    model, images, labels = model_and_images("linear")
    images[0, 0, 0, 0] = -0.0
    adversarial = attack(model, images, labels, epsilon=0)
    assert torch.equal(adversarial.view(torch.int32), images.view(torch.int32))
    assert adversarial.data_ptr() != images.data_ptr()


def test_non_contiguous_images(attack):
    model, images, labels = model_and_images("cnn")
    wide = torch.rand(4, 3, 8, 16)
    wide[..., ::2] = images
    assert torch.equal(attack(model, wide[..., ::2], labels, epsilon=0.1), attack(model, images, labels, epsilon=0.1))


def test_any_callable_can_be_attacked(attack):
    model, images, labels = model_and_images("linear")
    through_a_function = attack(lambda x: model(x), images, labels, epsilon=0.1)
    assert torch.equal(through_a_function, attack(model, images, labels, epsilon=0.1))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_works_where_gradients_are_off(context, kind, attack):
    model, images, labels = model_and_images(kind)
    expected = attack(model, images, labels, epsilon=0.1)
    with context():
        # Tensors made inside inference mode are the harder case.
        adversarial = attack(model, images.clone(), labels.clone(), epsilon=0.1)
    assert torch.equal(adversarial, expected)


# ---- the promises about the model ----


@pytest.mark.parametrize("kind", ["cnn", "lstm"])
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was_found(kind, training, attack):
    model, images, labels = model_and_images(kind)
    model.train(training)
    modules, parameters = list(model.modules()), list(model.parameters())
    modules[-1].train(not training)  # a mode of its own
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], 7)
    images_before, labels_before = images.clone(), labels.clone()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in modules]
    random_state = torch.get_rng_state()

    attack(model, images, labels, epsilon=0.1)

    assert modes == [module.training for module in modules]
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert torch.equal(parameters[1].grad, torch.full_like(parameters[1], 7))
    assert all(p.grad is None for i, p in enumerate(parameters) if i != 1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, images_before)
    assert torch.equal(labels, labels_before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_is_left_as_it_was_found_by_an_attack_that_fails(attack):
    model, images, labels = model_and_images("cnn")
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attack(model, images, labels, epsilon=0.1)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_is_taken_in_evaluation_mode_with_parameters_frozen(attack):
    model, images, labels = model_and_images("cnn")
    seen = []
    model.register_forward_hook(
        lambda module, *_: seen.append((module.training, any(p.requires_grad for p in module.parameters())))
    )
    attack(model.train(), images, labels, epsilon=0.1)
    assert set(seen) == {(False, False)}


def test_model_may_begin_in_place(attack):
    model, images, labels = model_and_images("linear")
    before = images.clone()
    adversarial = attack(lambda x: model(x.sub_(0.5)), images, labels, epsilon=0.1)
    assert torch.equal(adversarial, attack(lambda x: model(x - 0.5), images, labels, epsilon=0.1))
    assert torch.equal(images, before)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_cudnn_is_off_for_recurrent_models_with_dropout_and_on_again_afterwards(dropout, attack):
    """In evaluation mode, cuDNN has no backward pass of an LSTM. Without a GPU, the switch itself is checked."""
    model, (_, images, labels) = TinyLSTM(num_layers=2, dropout=dropout), model_and_images("lstm")
    seen = []
    model.register_forward_hook(lambda *_: seen.append((torch.backends.cudnn.enabled, model.lstm.training)))
    attack(model, images, labels, epsilon=0.1)
    assert set(seen) == {(not dropout, False)}
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_on_a_gpu_a_recurrent_layer_without_dropout_is_attacked_in_training_mode(dropout):
    model = TinyLSTM(num_layers=2, dropout=dropout).eval()
    with attacking(model, torch.device("cuda")):
        assert [module.training for module in model.modules()] == [False, not dropout, False]
    assert not model.lstm.training


def test_on_a_gpu_attacks_compute_in_float32_and_do_not_search_for_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # a notebook that ran before this test turns it off
    with attacking(nn.Linear(2, 2), torch.device("cuda")):
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32


def test_cudnn_is_off_for_plain_functions_which_may_hide_an_lstm(attack):
    model, images, labels = model_and_images("lstm")
    hidden, seen = [[[[model]]]], []  # deeper than `modules_of` looks
    model.lstm.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    attack(lambda x: hidden[0][0][0][0](x), images, labels, epsilon=0.1)
    assert set(seen) == {False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_cuda(kind, attack):
    model, images, labels = model_and_images(kind)
    expected = attack(model, images, labels, epsilon=0.01)
    adversarial = attack(model.cuda(), images.cuda(), labels.cuda(), epsilon=0.01)
    assert adversarial.is_cuda
    assert ((adversarial.cpu() - expected).abs() < 1e-6).float().mean() > 0.95  # but where the slope is about 0


# ---- bad input ----


def _bad(**changes):
    def change(images, labels):
        return changes.get("images", lambda x: x)(images), changes.get("labels", lambda y: y)(labels)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_bad(images=lambda x: (255 * x).to(torch.uint8)), TypeError, "floating point"),
        (_bad(images=lambda x: x.numpy()), TypeError, "floating point"),
        (_bad(labels=lambda y: y.tolist()), TypeError, "int64"),
        (_bad(images=lambda x: x * 255), ValueError, r"\[0, 1\]"),
        (_bad(images=lambda x: x - 0.5), ValueError, r"\[0, 1\]"),
        (_bad(images=lambda x: x.masked_fill(x < 0.5, float("nan"))), ValueError, r"\[0, 1\]"),
        (_bad(images=lambda x: x[0]), ValueError, r"\(N, C, H, W\)"),
        (_bad(labels=lambda y: y.to(torch.int32)), TypeError, "int64"),
        (_bad(labels=lambda y: y.float()), TypeError, "int64"),
        (_bad(labels=lambda y: y[:-1]), ValueError, r"labels \(N,\)"),
        (_bad(labels=lambda y: F.one_hot(y, 10)), ValueError, r"labels \(N,\)"),
        (_bad(labels=lambda y: y + 10), ValueError, r"0\.\.9"),
        (_bad(labels=lambda y: y - 10), ValueError, r"0\.\.9"),
    ],
)
def test_bad_input_is_refused(change, error, message, attack):
    model, images, labels = model_and_images("linear")
    with pytest.raises(error, match=message):
        attack(model, *change(images, labels), epsilon=0.1)


@pytest.mark.parametrize("epsilon", [-1, -1e-9, float("nan"), float("inf"), 1.001, 8, 8.0, 1e300])
@pytest.mark.parametrize("count", [0, 4])
def test_bad_epsilon_is_refused(epsilon, count, attack):
    model, images, labels = model_and_images("linear")
    hint = ": did you mean 8/255\\?" if epsilon == 8 else ""
    message = f"epsilon must be from 0 to 1, not .*{hint}"
    if norm_of(attack) == "l2":
        if epsilon > 0 and epsilon != float("inf"):
            adversarial = attack(model, images[:count], labels[:count], epsilon=epsilon)
            assert adversarial.isfinite().all()
            return
        message = "epsilon, an L2 radius, must be finite and at least 0, not "
    with pytest.raises(ValueError, match=message):
        attack(model, images[:count], labels[:count], epsilon=epsilon)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits * float("nan"), "NaN"),
        (lambda logits: logits.detach(), "no gradient"),
        (lambda logits: logits.flatten(), r"\(N, classes\)"),
        (lambda logits: logits[:1], r"\(N, classes\)"),
    ],
)
def test_bad_models_are_refused(spoil, message, attack):
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match=message):
        attack(lambda x: spoil(model(x)), images, labels, epsilon=0.1)


def test_gradient_of_a_single_image_is_that_in_a_batch():
    """On a CPU, a transposed map before an LSTM makes torch misread a single image's gradient in batch norm."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 16, 3, stride=8), nn.BatchNorm2d(16)).eval()
    lstm, readout = nn.LSTM(16, 64, num_layers=3, batch_first=True), nn.Linear(64, 10)

    def model(x):
        return readout(lstm(features(x).flatten(2).transpose(1, 2))[0][:, -1])

    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    (_, _, together), (_, _, alone) = (input_gradient(model, images[:n], labels[:n]) for n in (2, 1))
    torch.testing.assert_close(alone, together[:1], rtol=1e-3, atol=1e-3 * together.abs().max().item())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_refused(spoilt, attack):
    """Of a network whose answers are numbers."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(context, images):
            return images.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * spoilt

    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match="NaN or infinity"):
        attack(lambda x: model(Spoilt.apply(x)), images, labels, epsilon=0.1)


def test_gradients_whose_sum_is_not_finite_are_refused():
    def model(images):
        steep = images.flatten(1) @ torch.full((12,), 3e38)
        return torch.stack([steep, torch.full_like(steep, -50)], 1)

    with pytest.raises(ValueError, match="NaN or infinity"):
        fgsm(model, torch.zeros(2, 3, 2, 2), torch.tensor([1, 1]), epsilon=0.1, norm="l2", eot=2)


def unreached(attack, predicted):
    """Labels with which no start of the attack has succeeded already."""
    targeted = "targeted" in getattr(attack, "keywords", {})
    return (predicted + 1) % 10 if targeted else predicted


def test_zero_gradient_is_told(attack):
    _, images, _ = model_and_images("linear")
    logits = torch.eye(10)[[3, 3, 3, 3]]
    labels = unreached(attack, logits.argmax(1))
    with pytest.warns(RuntimeWarning, match=r"zero in every pixel of some images, or of all.*does not show robustness"):
        attack(lambda x: logits[: len(x)] + 0 * x.sum((1, 2, 3))[:, None], images, labels, epsilon=0.1)


def test_single_image_without_a_gradient_is_told(attack):
    """As of a network so sure of most images that their loss is zero; the others do have a gradient."""
    model, images, _ = model_and_images("linear")
    labels = unreached(attack, model(images).argmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(model, images, labels, epsilon=1e-4)
    images = images / 2
    images[0] = 1  # which is how the network knows it again, whichever images are left

    def sure_of_the_first(x):
        return model(x) * torch.where(x.detach().flatten(1).amin(1) > 0.9, 0, 1)[:, None]

    labels = unreached(attack, sure_of_the_first(images).argmax(1))
    with pytest.warns(RuntimeWarning, match="zero in every pixel of some images"):
        attack(sure_of_the_first, images, labels, epsilon=1e-4)
