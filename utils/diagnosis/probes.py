"""Small experiments with a model: do its answers stay, does its gradient predict them, does the attack find a plant?"""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks import AttackError, pgd
from attacks.core import Model, attacking, input_gradient, logits_of, margin
from attacks.state import remembering
from utils.constants import RADIUS
from utils.diagnosis.judging import Subject

REPEATED = 40  # queries after which a model must still give its first answers
SIMILAR = 100  # queries near one image, after which they must have the same logits as in a fresh copy
BISECTIONS = 18  # between two images; the interval that remains is far smaller than a pixel's level
JUMP = 0.02  # a change of the margin within that interval, as a share of the logits' standard deviation
SAME = 1e-3  # two logits differ if they lie further apart than this share of the logits' standard deviation


@dataclass
class Stability:
    """In what a model's answers change although they should not. Each text says how; an empty one: they do not."""

    repeated: str = ""
    batch: str = ""
    memory: str = ""
    random: bool = field(default=False, compare=False)


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of logits (N, K) differ by more than rounding."""
    tolerance = SAME * float(first.std()) + 1e-6 * float(first.abs().max())
    return not bool(((first - second).abs() <= tolerance).all())


@torch.no_grad()
def stability(subject: Subject, images: Tensor, epsilon: float) -> Stability:
    """Compare logits of the same images: again, of fresh copies, in other batches, and after other queries.

    images: float (N, C, H, W) in [0, 1], a few dozen. epsilon: the radius, in pixel units, of a nearby image.
    """
    found = Stability()
    first = logits_of(subject.new(), images)
    if any(differ(first, logits_of(subject.new(), images)) for _ in range(4)):
        found.random, found.repeated = True, "the same images have other logits in the next pass"
    with torch.enable_grad():
        watched = logits_of(subject.new(), images.clone().requires_grad_()).detach()
    if not found.random and differ(first, watched):
        found.repeated = "images have other logits when a gradient is asked for"
    if not found.random:
        parts = torch.cat([logits_of(subject.new(), part) for part in (images[:1], *images[1:].split(7)) if len(part)])
        crowd = images.repeat(-(-min(subject.batch_size, len(subject.split)) // len(images)), 1, 1, 1)
        crowded = logits_of(subject.new(), crowd)[: len(images)]  # a batch as large as those that are attacked
        reordered = logits_of(subject.new(), images.flip(0)).flip(0)
        if any(differ(first, others) for others in (reordered, parts, crowded)):
            found.batch = "an image has other logits in another batch"
    found.memory = _memory(subject, images, first, epsilon, found.random)
    stable = not (found.repeated or found.memory)
    if stable and _answers_attacks_otherwise(subject, images, first.argmax(1), epsilon):
        found.repeated = "an attack gets other logits than a caller who asks for the same images"
    return found


def _answers_attacks_otherwise(subject: Subject, images: Tensor, labels: Tensor, epsilon: float) -> bool:
    """Whether a model gives a short attack other logits for its iterates than a fresh copy gives a judge.

    Whatever a model may recognise an attack by (the caller, the state of autograd, values between grey levels), an
    attack that sees other answers than the judge searches for another network's examples.
    """
    model, asked = subject.new(), []

    def recorded(queries: Tensor) -> Tensor:
        logits = logits_of(model, queries)
        asked.append((queries.detach(), logits.detach()))
        return logits

    with remembering(recorded, ()), contextlib.suppress(AttackError):  # without a gradient, the first answer remains
        pgd(recorded, images, labels, epsilon=epsilon, steps=2, early_stop=False)
    return any(differ(logits, logits_of(subject.new(), queries)) for queries, logits in asked)


def _memory(subject: Subject, images: Tensor, first: Tensor, epsilon: float, random: bool) -> str:
    model = subject.new()
    nearby = (images + epsilon / 2 * torch.rand_like(images).sub(0.5).sign()).clamp_(0, 1)
    before = logits_of(model, images)
    after = logits_of(model, nearby)
    if float((before == after).all(1).float().mean()) > 0.1:
        return "nearby images have exactly the same logits"
    if random:
        return ""
    if differ(after, logits_of(subject.new(), nearby)):
        return "a nearby image has other logits after the image itself was asked"
    for query in range(REPEATED):
        model(images[query % len(images)][None])
    if differ(first, logits_of(model, images)):
        return "images have other logits after further queries"
    noise = torch.rand((SIMILAR, *images.shape[1:]), generator=torch.Generator().manual_seed(0)).sub_(0.5).to(images)
    similar = (images[:1] + epsilon * noise).clamp_(0, 1)
    logits_of(model, similar)
    some = similar[: len(images)]
    others = differ(logits_of(model, some), logits_of(subject.new(), some))
    return f"images have other logits after {SIMILAR} similar queries" if others else ""


@dataclass(frozen=True)
class Gradient:
    """Of `images` correctly classified images, how many have a gradient that does not lead an attack."""

    images: int
    zero: int  # cross-entropy's gradient is exactly 0 in most pixels
    wrong: int  # a tiny step changes the margin by less than half or more than twice what the gradient predicts
    idle: int  # a small step raises the margin by less than a quarter of what the gradient predicts

    @property
    def doubtful(self) -> bool:
        """Whether more than a tenth of the images have a gradient that does not lead an attack."""
        return max(self.zero, self.wrong, self.idle) > self.images / 10


def gradient_quality(model: Model, images: Tensor, labels: Tensor, epsilon: float) -> Gradient:
    """Compare a model's gradient with what small steps along its sign do: a sixty-fourth and a sixteenth of epsilon.

    The shipped networks' margins change 0.9 to 1.7 times as much as predicted in the tiny step, and 0.65 to 2.5 times
    in the small one. Raises AttackError if the gradient is missing.
    """
    epsilon = min(epsilon, RADIUS)
    with attacking(model, images.device):
        _, _, steep = input_gradient(model, images, labels)
        _, before, gradient = input_gradient(model, images, labels, margin)
        read = (gradient != 0).any(0)  # a network may skip pixels: then no image has a gradient there
        zero = (steep[:, read] == 0).float().mean(1) > 0.5 if read.any() else torch.ones_like(labels, dtype=torch.bool)

        def change(size: float) -> Tensor:
            """How much a step changes the margin, as a multiple of what the gradient predicts; NaN if that is 0."""
            moved = (images + size * gradient.sign()).clamp(0, 1)
            with torch.no_grad():
                return (margin(logits_of(model, moved), labels) - before) / (gradient * (moved - images)).flatten(
                    1
                ).sum(1)

        tiny, small = change(epsilon / 64), change(epsilon / 16)
    wrong, idle = ~((tiny > 1 / 2) & (tiny < 2)), ~(small > 1 / 4)
    return Gradient(len(labels), *(int(count.sum()) for count in (zero, wrong, idle)))


@torch.no_grad()
def jumps(model: Model, images: Tensor) -> tuple[int, int]:
    """At how many decision boundaries the logits jump, and how many boundaries were looked at.

    Between two images with different answers lies a boundary, which bisection finds (as in Brendel et al., 2018,
    arXiv:1712.04248). A network's logits are continuous, so there its two largest ones are equal. Where a detector
    exchanges the answers, or logits are rounded, they jump from one order to the other, and a gradient does not see it.

    images: float (N, C, H, W) in [0, 1]; each is paired with the first one that has another answer.
    """
    logits = logits_of(model, images)
    answers = logits.argmax(1)
    other = answers[:, None] != answers
    chosen = other.any(1)
    if not chosen.any():
        return 0, 0
    answer, low, high = answers[chosen], images[chosen], images[other.int().argmax(1)[chosen]]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        same = (logits_of(model, middle).argmax(1) == answer)[:, None, None, None]
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    change = margin(logits_of(model, high), answer) - margin(logits_of(model, low), answer)
    return int((change > JUMP * float(logits.std())).sum()), len(answer)


def planted_examples(
    subject: Subject, images: Tensor, *, epsilon: float, steps: int = 50, seed: int = 0
) -> tuple[int, int]:
    """How many adversarial examples that are known to exist an attack finds: (found, planted).

    Zimmermann et al., 2022, arXiv:2206.13991, section 4: a new classifier is put on the network's features, which
    accepts the image and points around it but refuses one point at the edge of the ball. The attack must find that
    point or another that is refused. Here the features are the logits, because a network's own features are not known:
    the classifier is linear, and its direction separates the point from the others as Fisher's discriminant does. An
    image where the point cannot be separated gets no plant. A network whose gradient leads nowhere hides the plant.

    images: float (N, C, H, W) in [0, 1]; epsilon: the radius, in pixel units. The attack is PGD on the margin.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.rand(images.shape, generator=generator).sub_(0.5).to(images)

    model = subject.new()
    with torch.no_grad():
        inner = torch.stack([logits_of(model, (images + epsilon * noise()).clamp(0, 1)) for _ in range(12)], 1).double()
        point = logits_of(model, (images + epsilon * noise().sign()).clamp(0, 1)).double()
    centre = inner.mean(1)
    spread = inner - centre[:, None]
    covariance = spread.transpose(1, 2) @ spread / inner.shape[1]
    ridge = 0.1 * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    covariance += ridge[:, None, None] * torch.eye(covariance.shape[1]).to(covariance)
    weights = torch.linalg.solve(covariance, (point - centre)[:, :, None])[:, :, 0]
    weights /= weights.norm(dim=1, keepdim=True).clamp_min(1e-12)
    refused, accepted = (weights * point).sum(1), (inner @ weights[:, :, None])[:, :, 0].amax(1)
    planted = refused > accepted + 1e-3 * spread.std((1, 2))
    if not planted.any():
        return 0, 0
    threshold = (refused + accepted) / 2

    def readout(model: Model, weights: Tensor, threshold: Tensor) -> Model:
        def classifier(images: Tensor) -> Tensor:
            score = (weights * logits_of(model, images).double()).sum(1) - threshold
            return torch.stack([torch.zeros_like(score), score], 1)

        return classifier

    kept, weights, threshold = images[planted], weights[planted], threshold[planted]
    labels = torch.zeros(len(kept), dtype=torch.int64, device=images.device)
    attacked = readout(subject.target, weights, threshold)
    options: dict = {"steps": steps, "loss": "margin", "early_stop": False, "seed": seed}
    try:
        with remembering(attacked, ()):  # its weights are for these images alone: it cannot be asked about others
            found = pgd(attacked, kept, labels, epsilon=epsilon, **options)
    except AttackError:
        return 0, len(kept)
    with torch.no_grad():
        broken = readout(subject.new(), weights, threshold)(found).argmax(1) == 1
    return int(broken.sum()), len(kept)
