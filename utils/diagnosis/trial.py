"""The attacks and experiments of a diagnosis, in their order, and the evidence that they leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attacks import AttackError, autoattack, fgsm, pgd
from attacks.core import Model, logits_of
from attacks.progress import in_turn
from attacks.strong import MOST_TARGETS, multi_targeted
from utils.data import Split, batches
from utils.diagnosis.inside import Mean, StraightThrough, networks_inside, place_after_preprocessing, shared_state
from utils.diagnosis.judging import Attacked, Craft, Subject
from utils.diagnosis.probes import (
    BISECTIONS,
    Gradient,
    Stability,
    differ,
    gradient_quality,
    jumps,
    planted_examples,
    stability,
)
from utils.diagnosis.surrogates import train_surrogate
from utils.evaluation import described
from utils.progress import moving, progress_bar

STEPS, MANY_STEPS, INSIDE_STEPS = 20, 100, 50
SAMPLE, PLANTED, PROBES = 100, 50, 32  # images for experiments that need no more
SQUARED = 50  # images, of those that withstand all other attacks, on which Square may spend its queries
LEAK_RADII = (0.02, 0.1, 0.2, 0.3)  # where transferred FGSM examples may be easier than clean images, in pixel units
MANY = f"PGD-{MANY_STEPS}"
VERSION = 2  # of the whole diagnosis: raise it when its attacks find other examples, so that notes are not used
FIRST_LOOK = 20  # units of a Step: what it costs to find out how the subject answers

Step: TypeAlias = tuple[int, str, Callable[[], None]]  # roughly how often an image passes the network, name, action
Source: TypeAlias = tuple[Model, Tensor | None]  # a model, and the images (bool, (N,)) that it may attack; None: all


@dataclass(kw_only=True)
class Evidence:
    """What the checks compare. None: it was not measured."""

    epsilon: float  # the radius, in pixel units
    clean: Tensor  # bool (N,), the images that fresh copies classify correctly
    stability: Stability = field(default_factory=Stability)
    uncopied: str = ""  # why no fresh copy could be made
    gradient: Gradient | None = None
    jumps: tuple[int, int] | None = None  # boundaries where the logits jump, and boundaries
    radii: Sequence[tuple[float, int, int]] = ()  # PGD at a radius: radius, images left, images
    unbounded: tuple[int, int] | None = None  # PGD at radius 1, where every image is within reach: images left, images
    fgsm: Attacked | None = None
    standard: Attacked | None = None  # PGD with STEPS steps on cross-entropy
    longer: Attacked | None = None  # MANY on cross-entropy
    margins: list[Attacked] = field(default_factory=list)  # PGD on the margin, and multi-targeted
    inside: list[Attacked] = field(default_factory=list)  # on the network inside, or past its preprocessing
    transferred: list[Attacked] = field(default_factory=list)
    square: Attacked | None = None
    walk: Attacked | None = None  # small steps from the image itself through all smaller balls
    planted: tuple[int, int] | None = None  # found, planted
    leaking: list[tuple[float, int, int]] = field(default_factory=list)  # radius, images easier than clean, harder

    @property
    def attacks(self) -> list[Attacked]:
        """All attacks within the radius, in the order in which they ran."""
        white_box = [self.fgsm, self.standard, self.longer, *self.margins, *self.inside]
        optional = [*white_box, *self.transferred, self.square, self.walk]
        return [attack for attack in optional if attack]

    @property
    def left(self) -> Tensor:
        """The images that withstand all attacks together, bool (N,)."""
        masks = [attack.left | ~attack.tried for attack in self.attacks]
        return torch.stack([self.clean, *masks]).all(0)


@dataclass(frozen=True)
class Trial:
    """One diagnosis: whom it tries, and with what. The fields are those of `utils.diagnosis.diagnose`."""

    subject: Subject
    epsilon: float
    sources: Sequence[Model]
    whole: Split | None
    queries: int
    seed: int

    @property
    def judged_for_leaking(self) -> Split:
        """The images on which label leaking is decided."""
        return self.subject.split if self.whole is None else self.whole

    def evidence(self, *, visible: bool) -> Evidence:
        """Run everything. visible: whether to show a progress bar."""
        subject = self.subject
        probes = _with_nearby(subject.some(PROBES)[0], self.epsilon / 2)
        shared = shared_state(subject.network)
        with torch.no_grad():
            asked_first = logits_of(subject.new(), probes)  # raises AttackError if they are not logits
        with progress_bar(title="diagnosis", total=FIRST_LOOK, unit="step", visible=visible) as bar:
            with moving(bar, FIRST_LOOK):
                found = Evidence(epsilon=self.epsilon, clean=subject.attack("clean images", _unchanged).left)
                found.uncopied = subject.uncopied
                if not found.clean.any():
                    return found
                plan = self._plan(found)
            bar.total += sum(units for units, *_ in plan)
            for units, name, action in plan:
                bar.set_postfix(now=name)
                with moving(bar, units):
                    action()
        if not subject.unstable and self._changed(probes, asked_first):
            found.stability.memory = "images have other logits after the attacks"
        found.uncopied = found.uncopied or self._unlike_copies(probes, asked_first, shared)
        return found

    def _plan(self, found: Evidence) -> list[Step]:
        """What to do with this subject, once it is known how it answers and where its gradient leads."""
        subject = self.subject
        probes, labels = subject.some(PROBES)
        found.stability = stable = stability(subject, probes, self.epsilon)
        subject.random, subject.batch_dependent = stable.random, bool(stable.batch)
        subject.stateful = bool(stable.memory)
        found.gradient = self._gradient()
        misled = found.gradient is None or found.gradient.doubtful
        inside = self._past_the_defence(found, self._models_inside(found, probes, labels, any_change=misled))
        long = [] if subject.unstable else self._white_box(found)
        # Where the gradient leads nowhere, the long attacks on it get only what is left by those past the defence.
        plan = [*self._first(found), *(inside + long if misled else long + inside)]
        return plan if subject.unstable else [*plan, *self._black_box(found, misled)]

    # ---- the plan ----

    def _first(self, found: Evidence) -> list[Step]:
        def single_step() -> None:
            found.fgsm = self._attack("FGSM", self._with(fgsm), among=found.clean)

        def standard() -> None:
            found.standard = self._attack(f"PGD-{STEPS}", self._pgd(steps=STEPS), among=found.clean)

        def margin() -> None:
            name = f"PGD-{STEPS} on the margin"
            found.margins.append(self._attack(name, self._pgd(steps=STEPS, loss="margin", early_stop=False)))

        plan = [(1, "FGSM", single_step), (STEPS, f"PGD-{STEPS}", standard)]
        return [*plan, (STEPS, "margin", margin)] if self.subject.unstable else plan

    def _white_box(self, found: Evidence) -> list[Step]:
        images, labels = self.subject.some(SAMPLE)

        def left(radius: float, **options: Any) -> int:
            craft = self._pgd(epsilon=radius, **options)
            try:
                return int(self.subject.right(craft(images, labels), labels).sum())
            except AttackError:
                return len(labels)

        def boundaries() -> None:
            found.jumps = jumps(self.subject.new(), images)

        def radii() -> None:
            larger = min(2 * self.epsilon, 1.0)
            three = in_turn((self.epsilon / 2, self.epsilon, larger), [1] * 3)
            found.radii = [(radius, left(radius, steps=STEPS), len(labels)) for radius in three]

        def unbounded() -> None:
            found.unbounded = left(1.0, steps=MANY_STEPS, loss="margin"), len(labels)

        def planted() -> None:
            found.planted = planted_examples(self.subject, images[:PLANTED], epsilon=self.epsilon, seed=self.seed)

        def longer() -> None:
            found.longer = self._attack(MANY, self._pgd(steps=MANY_STEPS, seed=self.seed + 1))

        def margin() -> None:
            name = f"PGD-{INSIDE_STEPS} on the margin"
            found.margins.append(self._attack(name, self._pgd(steps=INSIDE_STEPS, loss="margin")))

        def towards_other_classes() -> None:
            craft = self._with(multi_targeted, steps=INSIDE_STEPS, seed=self.seed)
            found.margins.append(self._attack("multi-targeted PGD", craft))

        return [
            (BISECTIONS, "boundaries", boundaries),
            (3 * STEPS, "other radii", radii),
            (MANY_STEPS, "unbounded", unbounded),
            (INSIDE_STEPS, "planted examples", planted),
            (MANY_STEPS, MANY, longer),
            (INSIDE_STEPS, "margin", margin),
            (MOST_TARGETS * INSIDE_STEPS, "other classes", towards_other_classes),
        ]

    def _past_the_defence(self, found: Evidence, inner: dict[str, Model]) -> list[Step]:
        def attack(name: str, model: Model) -> None:
            found.inside.append(self._attack(name, self._to_the_end(model)))

        return [(INSIDE_STEPS, name, partial(attack, name, model)) for name, model in inner.items()]

    def _black_box(self, found: Evidence, misled: bool) -> list[Step]:
        sources: list[Source] = []

        def find_sources() -> None:
            # Where the verdict is known and there is nothing to attack, no source is needed.
            if not misled or self.subject.withstands.any():
                sources.extend([(source, None) for source in self.sources] or self._surrogates())

        def transferred() -> None:
            kind = "a source" if self.sources else "a surrogate"
            for number, (source, part) in in_turn(enumerate(sources), [1] * len(sources)):
                crafts: dict[str, Craft] = {
                    "FGSM": partial(fgsm, source, epsilon=self.epsilon),
                    "PGD": self._to_the_end(source),
                }
                for name, craft in crafts.items():
                    among = self.subject.withstands if part is None else self.subject.withstands & part
                    outcome = self._attack(f"{name} through {kind}", craft, among=among, number=number)
                    found.transferred.append(outcome)

        def leaking() -> None:
            found.leaking = self._leaking(sources)

        def square() -> None:
            found.square = self._attack("Square", self._square, most=SQUARED)

        def walk() -> None:
            # The basic iterative method (Kurakin et al., 2017, arXiv:1607.02533, section 2.2). Other attacks start
            # from noise, so a defence that recognises noise hides from them what is near to the image.
            options: dict = {"steps": STEPS, "step_size": self.epsilon / STEPS, "loss": "margin"}
            craft = self._pgd(random_start=False, **options)
            found.walk = self._attack("small steps", craft, most=SAMPLE)

        return [
            (0 if self.sources else INSIDE_STEPS, "surrogate", find_sources),
            (INSIDE_STEPS, "transferred examples", transferred),
            (2 * len(self.judged_for_leaking) // len(self.subject.split), "label leaking", leaking),
            (self.queries, "Square", square),
            (STEPS, "small steps", walk),
        ]

    # ---- what the attacks need ----

    def _attack(self, name: str, craft: Craft, **options: Any) -> Attacked:
        return self.subject.attack(name, craft, **{**self._about, **options})

    @cached_property
    def _about(self) -> dict[str, Any]:
        """What every attack depends on, for the notes; once, because a digest reads all weights or images."""
        about: dict[str, Any] = {"epsilon": self.epsilon, "seed": self.seed, "queries": self.queries}
        if self.subject.notes:
            about |= {"version": VERSION, "sources": list(map(described, self.sources))}
            about["whole"] = self.whole and self.whole.digest()
        return about

    def _with(self, attack: Callable[..., Tensor], **options: Any) -> Craft:
        return partial(attack, self.subject.target, epsilon=self.epsilon, **options)

    def _pgd(self, **options: Any) -> Craft:
        return partial(pgd, self.subject.target, **{"epsilon": self.epsilon, "seed": self.seed, **options})

    def _square(self, images: Tensor, labels: Tensor) -> Tensor:
        """Square, which computes in float32, also on a model of another dtype."""

        def model(queries: Tensor) -> Tensor:
            return logits_of(self.subject.target, queries.to(images.dtype)).float()

        options: dict = {"epsilon": self.epsilon, "seed": self.seed, "attacks": ["square"], "queries": self.queries}
        target = self.subject.target if images.dtype == torch.float32 else model
        return autoattack(target, images.float(), labels, **options).to(images.dtype)

    def _to_the_end(self, model: Model) -> Craft:
        """PGD on the margin of a model that is not the judge: it does not stop where it only just fools that model."""
        options: dict = {"steps": INSIDE_STEPS, "loss": "margin", "early_stop": False}
        return partial(pgd, model, epsilon=self.epsilon, seed=self.seed, **options)

    def _gradient(self) -> Gradient | None:
        """How well the gradient leads, on some of the images; None if it is missing."""
        try:
            return gradient_quality(self.subject.target, *self.subject.some(SAMPLE), self.epsilon)
        except AttackError:
            return None

    def _models_inside(
        self, evidence: Evidence, images: Tensor, labels: Tensor, *, any_change: bool
    ) -> dict[str, Model]:
        """What an attacker who knows the defence attacks in its place, by the names of the attacks.

        any_change: as for `place_after_preprocessing`.
        """
        subject = self.subject
        found: dict[str, Model] = {}
        recognises = bool(evidence.stability.repeated) and not subject.random
        networks = networks_inside(subject.new(), images, labels, recognises_attacks=recognises)
        for number, network in enumerate(networks):
            found[f"PGD on the network inside{f' ({number + 1})' if number else ''}"] = network
        if len(networks) > 1:
            found["PGD on the networks inside together"] = Mean(list(networks))
        place = place_after_preprocessing(subject.new(), images, any_change=any_change)
        if place is not None:
            skipping = StraightThrough(subject.new(), place)
            found["PGD past the preprocessing"] = subject.steadied(skipping, renewed=False)
        return found

    def _surrogates(self) -> list[Source]:
        """Networks that have learnt the subject's answers."""
        split, subject = self.subject.split, self.subject
        learn = partial(train_surrogate, subject.new(), batch_size=subject.batch_size, seed=self.seed)
        if self.whole is not None:
            judged = {image.numpy().tobytes() for image in split.images.cpu()}
            others = [image.numpy().tobytes() not in judged for image in self.whole.images.cpu()]
            if any(others):
                return [(learn(self.whole.images[torch.tensor(others)]), None)]
        if len(split) < 2:
            return []
        half = torch.arange(len(split)) % 2 == 0
        return [(learn(split.images[taught.to(split.device)]), ~taught) for taught in in_turn((half, ~half), [1, 1])]

    def _leaking(self, sources: Sequence[Source]) -> list[tuple[float, int, int]]:
        """For each of LEAK_RADII: how many images FGSM's step through a source makes right, and how many wrong."""
        if not sources:
            return []
        split, model, source = self.judged_for_leaking, self.subject.new(), sources[0][0]
        counts = torch.zeros(len(LEAK_RADII), 2, dtype=torch.int64)
        count = -(-len(split) // self.subject.batch_size)
        for images, labels in in_turn(batches(split, self.subject.batch_size), [1] * count):
            try:
                direction = fgsm(source, images, labels, epsilon=1) - images
            except AttackError:  # the check of transferred examples says so
                return []
            with torch.no_grad():
                before = logits_of(model, images).argmax(1) == labels
                for row, radius in zip(counts, LEAK_RADII, strict=True):
                    moved = images + direction.sign() * radius
                    after = logits_of(model, moved.clamp_(0, 1)).argmax(1) == labels
                    row += torch.tensor([int((after & ~before).sum()), int((before & ~after).sum())])
        return [(radius, *row.tolist()) for radius, row in zip(LEAK_RADII, counts, strict=True)]

    @torch.no_grad()
    def _changed(self, probes: Tensor, asked_first: Tensor) -> bool:
        """Whether the working copy, or a new one, has other logits for the probes than at first."""
        return any(differ(asked_first, logits_of(m, probes)) for m in (self.subject.working, self.subject.new()))

    @torch.no_grad()
    def _unlike_copies(self, probes: Tensor, asked_first: Tensor, shared: object) -> str:
        """Why copies do not tell how the model itself answers; empty if they do. shared: `shared_state` at first."""
        if shared_state(self.subject.network) != shared:
            return "its copies share a state that queries change"
        if not self.subject.unstable and differ(asked_first, logits_of(self.subject.network, probes)):
            return "its copies have other logits than it has itself"
        return ""


def _with_nearby(images: Tensor, distance: float) -> Tensor:
    """Images (N, C, H, W), and after them as many whose pixels are all `distance` away."""
    signs = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).sub_(0.5).sign_().to(images)
    return torch.cat([images, (images + distance * signs).clamp_(0, 1)])


def _unchanged(images: Tensor, labels: Tensor) -> Tensor:
    return images
