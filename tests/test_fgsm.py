"""FGSM against its formula, and its promises over a table of models, dtypes, memory formats and sizes."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks import fgsm, fgsm_direction, step
from networks import CNN, CNNLSTM, SmallCNN

EPSILONS = [0, 1e-4, 1 / 255, Fraction(8, 255), 0.1, 0.9, 1.5, 1e300]


class TinyLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.linear = nn.Linear(5, 10)

    def forward(self, images):
        return self.linear(self.lstm(images.sum(2).transpose(1, 2))[0][:, -1])  # reads column by column


def tiny_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10)
    )


def linear_classifier():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def model_and_images(kind, size=8, count=4, seed=0):
    torch.manual_seed(seed)
    images, labels = torch.rand(count, 3, size, size), torch.randint(10, (count,))
    model = {"cnn": tiny_cnn, "lstm": TinyLSTM, "linear": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))}[
        kind
    ]()
    model(torch.rand(2, 3, size, size))  # gives lazy layers their shape, and batch norm statistics of its own
    return model, images, labels


# ---- the formula ----


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), epsilon=st.floats(0, 0.5), targeted=st.booleans())
def test_equals_the_closed_form_for_a_linear_softmax_classifier(seed, epsilon, targeted):
    """There, grad_x of the cross-entropy is W^T (softmax(Wx + b) - onehot(y)): computed by numpy in float64."""
    model, images, labels = model_and_images("linear", seed=seed)
    model, images = model.double(), images.double()
    weight, bias = (parameter.detach().numpy() for parameter in model[1].parameters())
    flat = images.flatten(1).numpy()
    logits = flat @ weight.T + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (probabilities - np.eye(10)[labels]) @ weight
    expected = np.clip(flat + (-epsilon if targeted else epsilon) * np.sign(gradient), 0, 1)

    adversarial = fgsm(model, images, labels, epsilon=epsilon, targeted=targeted)

    np.testing.assert_allclose(adversarial.flatten(1).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["cnn", "lstm"])
@pytest.mark.parametrize("seed", range(3))
def test_direction_equals_the_sign_of_central_differences(kind, seed):
    model, images, labels = model_and_images(kind, size=5, count=2, seed=seed)
    model, images = model.double(), images.double()
    direction = fgsm_direction(model, images, labels)
    model.eval()
    h = 1e-5
    for i in range(len(images)):
        steps = h * torch.eye(images[i].numel(), dtype=torch.float64).view(-1, *images[i].shape)
        label = labels[i].expand(len(steps))
        with torch.no_grad():
            up = F.cross_entropy(model(images[i] + steps), label, reduction="none")
            down = F.cross_entropy(model(images[i] - steps), label, reduction="none")
        slope = ((up - down) / (2 * h)).view_as(images[i])
        clear = slope.abs() > 1e-9  # below, the difference is rounding error
        assert clear.float().mean() > 0.8
        assert torch.equal(direction[i][clear], slope[clear].sign())


def test_raises_the_loss_and_targeted_lowers_it():
    model, images, labels = model_and_images("cnn")
    model.eval()

    def loss(x):
        return F.cross_entropy(model(x), labels).item()

    assert loss(fgsm(model, images, labels, epsilon=0.01)) > loss(images)
    assert loss(fgsm(model, images, labels, epsilon=0.01, targeted=True)) < loss(images)


def test_an_image_is_perturbed_alike_whatever_else_is_in_the_batch():
    model, images, labels = model_and_images("cnn", count=6)
    model, images = model.double(), images.double()  # in float32 a slope may be zero to rounding
    together = fgsm_direction(model, images, labels)
    alone = torch.cat([fgsm_direction(model, images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_one_direction_serves_every_epsilon(epsilon):
    model, images, labels = model_and_images("cnn")
    direction = fgsm_direction(model, images, labels)
    adversarial = fgsm(model, images, labels, epsilon=epsilon)
    assert torch.equal(adversarial, (images + float(epsilon) * direction).clamp(0, 1))
    assert torch.equal(adversarial, step(images, direction, epsilon))


# ---- the promises about the result ----

MODELS = {
    "linear": lambda: model_and_images("linear", size=32)[0],
    "convolution, batch norm, dropout": lambda: model_and_images("cnn", size=32)[0],
    "lstm": TinyLSTM,
    "CNN": lambda: CNN(width=4),
    "CNNLSTM": lambda: CNNLSTM(width=4),
    "SmallCNN": lambda: SmallCNN(width=4),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_result_is_close_valid_and_typed_as_the_images(name, dtype, memory_format, count):
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    # Multiples of 1/255, with both ends of the range, as real images have them.
    images = (torch.randint(0, 256, (count, 3, 32, 32)) / 255).to(dtype, memory_format=memory_format)
    labels = torch.randint(10, (count,))
    for epsilon in EPSILONS:
        adversarial = fgsm(model, images, labels, epsilon=epsilon)
        assert (adversarial.shape, adversarial.dtype, adversarial.device) == (images.shape, dtype, images.device)
        assert not adversarial.requires_grad
        if epsilon == 0:
            assert torch.equal(adversarial, images)
        if count:
            assert adversarial.is_contiguous(memory_format=memory_format)
            assert adversarial.min() >= 0
            assert adversarial.max() <= 1
            distance = (adversarial.double() - images.double()).abs().max()
            assert distance <= epsilon + torch.finfo(dtype).eps


def test_epsilon_zero_returns_the_images_bit_for_bit_and_not_the_same_tensor():
    model, images, labels = model_and_images("linear")
    images[0, 0, 0, 0] = -0.0
    adversarial = fgsm(model, images, labels, epsilon=0)
    assert torch.equal(adversarial.view(torch.int32), images.view(torch.int32))
    assert adversarial.data_ptr() != images.data_ptr()


def test_non_contiguous_images():
    model, images, labels = model_and_images("cnn")
    wide = torch.rand(4, 3, 8, 16)
    wide[..., ::2] = images
    assert torch.equal(fgsm(model, wide[..., ::2], labels, epsilon=0.1), fgsm(model, images, labels, epsilon=0.1))


def test_any_callable_can_be_attacked():
    model, images, labels = model_and_images("linear")
    through_a_function = fgsm(lambda x: model(x), images, labels, epsilon=0.1)
    assert torch.equal(through_a_function, fgsm(model, images, labels, epsilon=0.1))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_works_where_gradients_are_off(context, kind):
    model, images, labels = model_and_images(kind)
    expected = fgsm(model, images, labels, epsilon=0.1)
    with context():
        # Tensors made inside inference mode are the harder case.
        adversarial = fgsm(model, images.clone(), labels.clone(), epsilon=0.1)
    assert torch.equal(adversarial, expected)


# ---- the promises about the model ----


@pytest.mark.parametrize("kind", ["cnn", "lstm"])
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was_found(kind, training):
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

    fgsm(model, images, labels, epsilon=0.1)

    assert modes == [module.training for module in modules]
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert torch.equal(parameters[1].grad, torch.full_like(parameters[1], 7))
    assert all(p.grad is None for i, p in enumerate(parameters) if i != 1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, images_before)
    assert torch.equal(labels, labels_before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_is_left_as_it_was_found_by_an_attack_that_fails():
    model, images, labels = model_and_images("cnn")
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fgsm(model, images, labels, epsilon=0.1)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_is_taken_in_evaluation_mode_with_parameters_frozen():
    model, images, labels = model_and_images("cnn")
    seen = []
    model.register_forward_hook(
        lambda module, *_: seen.append((module.training, any(p.requires_grad for p in module.parameters())))
    )
    fgsm(model.train(), images, labels, epsilon=0.1)
    assert seen == [(False, False)]


def test_model_may_begin_in_place():
    model, images, labels = model_and_images("linear")
    before = images.clone()
    adversarial = fgsm(lambda x: model(x.sub_(0.5)), images, labels, epsilon=0.1)
    assert torch.equal(adversarial, fgsm(lambda x: model(x - 0.5), images, labels, epsilon=0.1))
    assert torch.equal(images, before)


@pytest.mark.parametrize(("kind", "enabled"), [("lstm", False), ("cnn", True)])
def test_cudnn_is_off_for_recurrent_models_alone_and_on_again_afterwards(kind, enabled):
    """In evaluation mode, cuDNN has no backward pass of an LSTM. Without a GPU, the switch itself is checked."""
    model, images, labels = model_and_images(kind)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    assert torch.backends.cudnn.enabled
    fgsm(model, images, labels, epsilon=0.1)
    assert seen == [enabled]
    assert torch.backends.cudnn.enabled


def test_cudnn_is_off_for_plain_functions_which_may_hide_an_lstm():
    model, images, labels = model_and_images("lstm")
    seen = []
    model.lstm.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    fgsm(lambda x: model(x), images, labels, epsilon=0.1)
    assert seen == [False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_cuda(kind):
    model, images, labels = model_and_images(kind)
    expected = fgsm_direction(model, images, labels)
    direction = fgsm_direction(model.cuda(), images.cuda(), labels.cuda())
    assert direction.is_cuda
    assert (direction.cpu() == expected).float().mean() > 0.99  # but for gradients that are zero to rounding


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
def test_bad_input_is_refused(change, error, message):
    model, images, labels = model_and_images("linear")
    with pytest.raises(error, match=message):
        fgsm(model, *change(images, labels), epsilon=0.1)


@pytest.mark.parametrize("epsilon", [-1, -1e-9, float("nan"), float("inf")])
@pytest.mark.parametrize("count", [0, 4])
def test_bad_epsilon_is_refused(epsilon, count):
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match="epsilon"):
        fgsm(model, images[:count], labels[:count], epsilon=epsilon)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits * float("nan"), "NaN"),
        (lambda logits: logits.detach(), "no gradient"),
        (lambda logits: logits.flatten(), r"\(N, classes\)"),
        (lambda logits: logits[:1], r"\(N, classes\)"),
    ],
)
def test_bad_models_are_refused(spoil, message):
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match=message):
        fgsm(lambda x: spoil(model(x)), images, labels, epsilon=0.1)
