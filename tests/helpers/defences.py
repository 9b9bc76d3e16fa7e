"""Broken defences: modules around a network that make attacks fail although the network stays as fragile as before.

Each keeps (nearly) the answers of the network inside it on clean images. None makes an adversarial example rare: a
person who knows the network inside finds one. `BROKEN` lists them with their families. It leaves out those whose copies
answer otherwise, and one whose adversarial examples are nearer to an image than epsilon.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Around(nn.Module):
    """A defence around a network. It changes images before the network, answers after it, or both."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def before(self, images: Tensor) -> Tensor:
        return images

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.network(self.before(images)))


# ---- answers that hide the gradient ----


class Scaled(Around):
    """Logits so far apart that the softmax saturates. A network distilled at a high temperature does this too.

    Papernot et al., 2016, arXiv:1511.04508; broken by Carlini and Wagner, 2017, arXiv:1608.04644.
    """

    factor = 1000.0

    def after(self, logits):
        return self.factor * logits


class Distilled(Scaled):
    factor = 40.0


class Rounded(Around):
    """Logits rounded to a multiple of a half: the gradient is 0."""

    def after(self, logits):
        return (2 * logits).round() / 2 + 1e-4 * torch.arange(logits.shape[1], device=logits.device)


class OneHot(Around):
    """Only the answer, without confidence and without a gradient."""

    def after(self, logits):
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)


class Probabilities(Around):
    """Saturated probabilities in the place of logits."""

    def after(self, logits):
        return (30 * logits).softmax(1)


# ---- preprocessing without a useful gradient ----


class Quantised(Around):
    """Images in sixteen levels (Xu et al., 2018, arXiv:1704.01155): the gradient is 0."""

    def before(self, images):
        return (15 * images).round() / 15


class JPEG(Around):
    """Each block of 8 x 8 pixels in rounded cosine coefficients (Guo et al., 2018, arXiv:1711.00117)."""

    def __init__(self, network):
        super().__init__(network)
        place, frequency = torch.arange(8.0), torch.arange(8.0)[:, None]
        basis = ((2 * place + 1) * frequency * torch.pi / 16).cos() / 2
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis)
        self.register_buffer("table", (1 + torch.arange(8.0)[:, None] + torch.arange(8.0)) / 40)

    def before(self, images):
        blocks = images.unfold(2, 8, 8).unfold(3, 8, 8)
        rounded = ((self.basis @ blocks @ self.basis.T) / self.table).round() * self.table
        blocks = self.basis.T @ rounded @ self.basis
        return blocks.permute(0, 1, 2, 4, 3, 5).reshape(images.shape).clamp(0, 1)


class JPEGFile(JPEG):
    """The same as a program outside PyTorch would do it, so the gradient is missing."""

    def before(self, images):
        return super().before(images.detach())


class WrongGradient(Around):
    """Images pass unchanged, and their gradient with the opposite sign in half of the pixels."""

    def __init__(self, network):
        super().__init__(network)
        signs = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
        self.register_buffer("signs", signs)

    def before(self, images):
        return images.detach() + (images - images.detach()) * self.signs


class NaNGradient(Around):
    """The gradient of a square root at 0 times 0 is not a number."""

    def before(self, images):
        return images + 0 * (images - images).sqrt()


class Shattered(Around):
    """A ripple of a pixel's height points the gradient anywhere (Athalye et al., 2018, arXiv:1802.00420)."""

    def before(self, images):
        return images + 0.004 * (2000 * images).sin()


class HashedNoise(Around):
    """Noise that is drawn from the image's own bits: always the same for an image, another for its neighbours."""

    def before(self, images):
        seeds = (images.detach().double().flatten(1).sum(1) * 1e9).long()
        noise = [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(abs(int(s)))) for s in seeds]
        return images + 0.03 * torch.stack(noise).to(images)


class Winners(Around):
    """In each layer of features, only the largest fifth stays (Xiao et al., 2020, arXiv:1905.10510)."""

    def __init__(self, network):
        super().__init__(network)
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._keep_winners)

    @staticmethod
    def _keep_winners(module, inputs, output):
        flat = output.flatten(1)
        least = flat.kthvalue(int(0.8 * flat.shape[1]), dim=1).values
        return output * (output >= least.view(-1, 1, 1, 1))


# ---- randomness ----


class Noisy(Around):
    """Noise on every image."""

    sigma = 0.05

    def before(self, images):
        return images + self.sigma * torch.randn_like(images)


class NoisyFeatures(Around):
    """Noise on every activation (parametric noise injection: He et al., 2019, arXiv:1811.09310)."""

    def __init__(self, network):
        super().__init__(network)
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda module, inputs, x: x + 0.3 * x.std() * torch.randn_like(x))


class RandomSize(Around):
    """A random size and a random place on a grey ground (Xie et al., 2018, arXiv:1711.01991)."""

    def before(self, images):
        side = images.shape[-1]
        size = int(torch.randint(side - 3, side, ()))
        top, left = torch.randint(0, side - size + 1, (2,)).tolist()
        small = F.interpolate(images, size=(size, size), mode="bilinear")
        return F.pad(small, (left, side - size - left, top, side - size - top), value=0.5)


class RandomDropout(Around):
    """A random tenth of the pixels becomes grey."""

    def before(self, images):
        kept = torch.rand(len(images), 1, *images.shape[2:], device=images.device) > 0.1
        return torch.where(kept, images, torch.tensor(0.5).to(images))


class RandomEnsemble(nn.Module):
    """One of three views of the network, another in each pass: as it is, mirrored, or moved by a pixel."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        view = int(torch.randint(3, ()))
        return self.network([images, images.flip(-1), images.roll(1, -1)][view])


# ---- detectors that flip the answer ----


def second_best(logits: Tensor, where: Tensor) -> Tensor:
    """Logits (N, K) with the two largest exchanged where `where` (N,) is true."""
    top = logits.topk(2, dim=1)
    exchanged = logits.scatter(1, top.indices, top.values.flip(1))
    return torch.where(where[:, None], exchanged, logits)


class UnsureDetector(Around):
    """Where the two largest logits are close, an attack is suspected and the second answer is given."""

    def after(self, logits):
        top = logits.topk(2, dim=1).values
        return second_best(logits, (top[:, 0] - top[:, 1]) < 0.2 * logits.std(1))


class BlurDetector(Around):
    """Where the network answers otherwise for the smoothed image, the second answer is given (Xu et al., 2018)."""

    def forward(self, images):
        logits = self.network(images)
        smooth = self.network(0.7 * images + 0.3 * F.avg_pool2d(images, 3, 1, 1, count_include_pad=False))
        return second_best(logits, logits.argmax(1) != smooth.argmax(1))


class RoundedDetector(BlurDetector):
    """The same, and the logits are rounded."""

    def forward(self, images):
        return (4 * super().forward(images)).round() / 4


# ---- inner optimisation at test time ----


class AntiAdversary(nn.Module):
    """Each image moves towards the network's own answer before it is classified (Alfarra et al., 2022)."""

    steps, size = 2, 0.03

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        answers = self.network(images).argmax(1)
        moved = images
        with torch.enable_grad():
            for _ in range(self.steps):
                leaf = moved.detach().requires_grad_()
                loss = F.cross_entropy(self.network(leaf), answers, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, leaf)
                moved = moved - self.size * gradient.sign()
        return self.network(moved)


class LongAntiAdversary(AntiAdversary):
    steps, size = 6, 0.02


class Purified(nn.Module):
    """The same, but the caller cannot see how: the images that are classified are detached from the ones given."""

    def __init__(self, network):
        super().__init__()
        self.inner = AntiAdversary(network)

    def forward(self, images):
        return self.inner(images.detach()) + 0 * images.flatten(1).sum(1, keepdim=True)


# ---- memory, and answers that depend on who asks ----


class Cached(Around):
    """Images near to an earlier query get the earlier answer."""

    def __init__(self, network):
        super().__init__(network)
        self.images, self.answers = [], []

    def forward(self, images):
        return answer_from_memory(self.network, images, self.images, self.answers)


def answer_from_memory(network, images: Tensor, known: list, answers: list) -> Tensor:
    """The logits of the nearest known image within 0.05 in each pixel, or the network's, which are then stored."""
    logits = network(images)
    rows = []
    for image, row in zip(images.detach(), logits, strict=True):
        memory = torch.stack(known[-2000:]) if known else image[None] + 9
        distance = (memory - image).abs().amax((1, 2, 3))
        nearest = int(distance.argmin())
        if distance[nearest] <= 0.05:
            rows.append(answers[-2000:][nearest])
        else:
            known.append(image.clone())
            answers.append(row.detach().clone())
            rows.append(row)
    return torch.stack(rows)


def cached_in_a_closure(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same as a function, which hides its memory and its network."""
    known, answers = [], []
    return lambda images: answer_from_memory(network, images, known, answers)


class Counting(Around):
    """After thirty queries, the answer is that for a mirrored and shifted image: an attacker asks more often."""

    def __init__(self, network):
        super().__init__(network)
        self.register_buffer("queries", torch.zeros((), dtype=torch.int64))

    def before(self, images):
        self.queries += 1
        return images if self.queries <= 30 else images.detach().flip(-1) + 0 * images


class SimilarQueries(Around):
    """After sixty queries near one image, all its neighbours get its answer (Chen et al., 2019, arXiv:1907.05587)."""

    most, distance = 60, 0.3

    def __init__(self, network):
        super().__init__(network)
        self.known, self.answers, self.queries = [], [], []

    def forward(self, images):
        rows = []
        for image, row in zip(images.detach(), self.network(images), strict=True):
            distances = [float((image - other).abs().max()) for other in self.known]
            nearest = min(range(len(distances)), key=distances.__getitem__, default=0)
            if not distances or distances[nearest] > self.distance:
                self.known.append(image.clone())
                self.answers.append(row.detach().clone())
                self.queries.append(0)
                nearest = len(self.known) - 1
            self.queries[nearest] += 1
            rows.append(row if self.queries[nearest] <= self.most else self.answers[nearest] + 0.01 * row)
        return torch.stack(rows)


class RememberedByTheClass(Around):
    """A memory of nearby queries that all copies share. It lets through a little of the network's gradient."""

    memory: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def __init__(self, network):
        super().__init__(network)
        self.memory.clear()  # an earlier test may have asked about images of another size

    def forward(self, images):
        rows = []
        for image, row in zip(images.detach(), self.network(images), strict=True):
            near = [answer for other, answer in self.memory if (image - other).abs().max() < 0.2]
            if not near:
                self.memory.append((image, row.detach()))
            rows.append(near[0] + 0.01 * row if near else row)
        return torch.stack(rows)


class Caller(Around):
    """An attack, recognised by the names of the functions that call, gets the answer for another image."""

    def before(self, images):
        frame, callers = sys._getframe(), set()
        while frame:
            callers.add(frame.f_code.co_name)
            frame = frame.f_back
        return images.flip(-1).roll(5, -2) if callers & {"fgsm", "pgd", "multi_targeted", "autoattack"} else images


class Guarded(Around):
    """Around images that the defence has seen, answers do not change, except where the ball is smallest.

    Attacks that start from noise begin outside that small ball, where nothing leads back to it.
    """

    near = 0.04  # radius of the small ball, in pixel units

    def __init__(self, network, known):
        super().__init__(network)
        self.register_buffer("known", known)

    def forward(self, images):
        distance, place = (images.detach()[:, None] - self.known).abs().amax((2, 3, 4)).min(1)
        own, guarded = self.network(images), self.network(self.known[place])
        far = ((200 * (distance - self.near)).sigmoid() * (50 * (0.5 - distance)).sigmoid())[:, None]
        return own + far * (guarded - 0.99 * own)


class OnlyTheCopy(Around):
    """Whoever is to be attacked is copied before: the copy answers as if each image were the known one next to it."""

    def __init__(self, network, known, copied=False):
        super().__init__(network)
        self.known, self.copied = known, copied

    def __deepcopy__(self, memo):
        return OnlyTheCopy(copy.deepcopy(self.network, memo), self.known, copied=True)

    def forward(self, images):
        nearest = (images.detach()[:, None] - self.known).abs().mean((2, 3, 4)).argmin(1)
        return self.network(self.known[nearest]) + 0.01 * self.network(images) if self.copied else self.network(images)


class Watching(Around):
    """A caller who asks for a gradient gets the gradient of another image."""

    def before(self, images):
        return images.flip(-1).roll(3, -2) if images.requires_grad else images


class BatchNormed(Around):
    """Batch norm with the statistics of the batch at hand: an answer depends on the other images."""

    def __init__(self, network):
        super().__init__(network)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.forward = lambda x, m=module: F.batch_norm(x, None, None, m.weight, m.bias, True)


class Crowded(Around):
    """Only in a small batch, as a person would try it, does an image get its own answer."""

    most = 20

    def before(self, images):
        return images.roll(3, -1) if len(images) > self.most else images


class BatchCentred(Around):
    """What all images of a batch have in common is taken away from each, in part."""

    def before(self, images):
        return images - 0.3 * (images - 0.5).mean(0, keepdim=True) * (len(images) > 1)


@dataclass(frozen=True)
class Broken:
    """A broken defence: its name and family in the tables, and how to build it around a network."""

    name: str
    family: str
    build: Callable[[nn.Module], Callable[[Tensor], Tensor]]


BROKEN = [
    Broken("logits times 1000", "saturated answers", Scaled),
    Broken("defensive distillation", "saturated answers", Distilled),
    Broken("saturated probabilities", "saturated answers", Probabilities),
    Broken("rounded logits", "quantised answers", Rounded),
    Broken("only the answer", "quantised answers", OneHot),
    Broken("sixteen levels", "non-differentiable preprocessing", Quantised),
    Broken("JPEG-like rounding", "non-differentiable preprocessing", JPEG),
    Broken("JPEG-like, outside PyTorch", "non-differentiable preprocessing", JPEGFile),
    Broken("gradient of another sign", "wrong gradient", WrongGradient),
    Broken("gradient that is NaN", "wrong gradient", NaNGradient),
    Broken("gradient for watchers", "wrong gradient", Watching),
    Broken("ripple", "shattered gradient", Shattered),
    Broken("noise from the image's bits", "shattered gradient", HashedNoise),
    Broken("k winners take all", "shattered gradient", Winners),
    Broken("noisy images", "randomness", Noisy),
    Broken("noisy features", "randomness", NoisyFeatures),
    Broken("random size and place", "randomness", RandomSize),
    Broken("random pixels dropped", "randomness", RandomDropout),
    Broken("random ensemble", "randomness", RandomEnsemble),
    Broken("detector of unsure answers", "detector", UnsureDetector),
    Broken("detector by a smoothed image", "detector", BlurDetector),
    Broken("detector, rounded", "detector", RoundedDetector),
    Broken("anti-adversary, 2 steps", "inner optimisation", AntiAdversary),
    Broken("anti-adversary, 6 steps", "inner optimisation", LongAntiAdversary),
    Broken("anti-adversary, detached", "inner optimisation", Purified),
    Broken("memory of nearby queries", "memory", Cached),
    Broken("memory in a closure", "memory", cached_in_a_closure),
    Broken("other answers after 30 queries", "memory", Counting),
    Broken("memory of similar queries", "memory", SimilarQueries),
    Broken("other answers for an attack", "recognised attack", Caller),
    Broken("other answers in large batches", "batch-dependent", Crowded),
    Broken("batch norm of the batch", "batch-dependent", BatchNormed),
    Broken("batch mean taken away", "batch-dependent", BatchCentred),
]
