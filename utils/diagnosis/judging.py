"""A model on trial: attacks ask a working copy of it, and fresh copies judge every example."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attacks.core import AttackError, Model, check_labels, logits_of
from attacks.modules import modules_of
from attacks.progress import in_turn
from utils import distributed
from utils.data import Split, tensor_digest
from utils.diagnosis.inside import Mean, Renewed, freeze, fresh
from utils.evaluation import ATTACK_VERSIONS, evaluation_key
from utils.notes import Notes

PASSES = 5  # of fresh copies that judge an example, if the model answers at random
EOT = 4  # passes whose mean gradient an attack follows, if the model answers at random

Craft = Callable[[Tensor, Tensor], Tensor]  # from images (N, C, H, W) and labels (N,) to adversarial examples


@dataclass(frozen=True)
class Attacked:
    """What one attack did. tried, left: bool (N,), over the images of a split: attacked, and of these not broken."""

    name: str
    tried: Tensor
    left: Tensor
    error: str = ""  # why the attack could not follow the gradient; then nothing is broken

    @property
    def images(self) -> int:
        return int(self.tried.sum())

    @property
    def broken(self) -> int:
        return int((self.tried & ~self.left).sum())


class Subject:
    """A model, the images it is judged on, and which of them withstand everything so far.

    random, stateful, batch_dependent: what `probes.stability` has found. A model that answers at random is
    attacked through the mean of several passes. A model with a memory is attacked through fresh copies. A model that
    mixes the images of a batch is attacked with whole batches, since examples for another batch would not suit it.
    """

    random = stateful = batch_dependent = False

    def __init__(self, network: Model, split: Split, *, batch_size: int, notes: Notes | None = None) -> None:
        self.network, self.split, self.batch_size, self.notes = network, split, batch_size, notes
        try:
            self.original, self.uncopied = fresh(network), ""
            if {*map(id, modules_of(network))} & {*map(id, modules_of(self.original))}:
                self.original, self.uncopied = network, "its copies share modules with it"
            else:
                freeze(self.original)
        except Exception as error:  # whatever a class raises that cannot be copied
            self.original, self.uncopied = network, f"it cannot be copied ({type(error).__name__})"
        self.working = self.new()
        self.withstands = torch.ones(len(split), dtype=torch.bool)

    @property
    def unstable(self) -> bool:
        return self.random or self.stateful or self.batch_dependent

    def new(self) -> Model:
        """A copy that nobody has asked yet; the network itself if it cannot be copied."""
        return self.original if self.uncopied else fresh(self.original)

    @property
    def target(self) -> Model:
        """What a white-box attack follows."""
        return self.steadied(self.working)

    def steadied(self, model: Model, *, renewed: bool = True) -> Model:
        """A model that behaves like the subject, made fit for an attack. renewed: False if it must not be copied."""
        model = Renewed(model) if self.stateful and renewed else model
        return Mean([model] * EOT) if self.random else model

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which images fresh copies classify correctly, bool (N,): most of the passes, if the model is random."""
        with torch.no_grad():
            answers = [logits_of(self.new(), images) for _ in range(PASSES if self.random else 1)]
        check_labels(labels, answers[0])
        return torch.stack([logits.argmax(1) == labels for logits in answers]).float().mean(0) > 0.5

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` images that still withstand, and their labels; fewer if there are fewer.

        They are spread over the split, because images often come in the order of their classes.
        """
        left = self.withstands.nonzero().flatten()
        places = torch.arange(min(count, len(left))) * len(left) // max(1, min(count, len(left)))
        return self.split.take(left[places].to(self.split.device))

    def attack(
        self, name: str, craft: Craft, *, among: Tensor | None = None, most: int | None = None, **about: Any
    ) -> Attacked:
        """Attack images batch by batch, judge the examples, and keep the outcome.

        craft: the attack. among: bool (N,), the images to attack; by default those that still withstand. most: attack
        only so many of them. about: what tells this attack from others of its name, JSON-serialisable, for the notes.
        """
        tried = (self.withstands if among is None else among).clone()
        if self.batch_dependent:
            tried[:] = True
        if most is not None:
            tried[tried.nonzero().flatten()[most:]] = False
        chosen = tried.nonzero().flatten()
        left = torch.zeros_like(tried)
        try:
            left[chosen] = self._left(name, chosen, craft, about)
            outcome = Attacked(name, tried, left)
        except AttackError as error:
            outcome = Attacked(name, torch.zeros_like(tried), left, str(error))
        self.withstands &= outcome.left | ~outcome.tried
        return outcome

    def _left(self, name: str, chosen: Tensor, craft: Craft, about: dict[str, Any]) -> Tensor:
        """Which of the chosen images (int64, (M,)) are still classified correctly: bool (M,)."""
        if self.notes:
            about = {"diagnosis": name, "chosen": tensor_digest(chosen), "versions": ATTACK_VERSIONS, **about}
            key = evaluation_key(self.network, self.split, "pgd", 0.0, about, None, self.batch_size)
            noted = distributed.from_main(partial(self.notes.kept, key, [len(chosen)]))
            if noted:
                return torch.tensor([hit == "1" for hit in noted[0][0]], dtype=torch.bool)
        batches = chosen.to(self.split.device).split(self.batch_size) if len(chosen) else ()
        mine = []
        share = batches[distributed.rank() :: distributed.world_size()]
        for batch in in_turn(share, [len(batch) for batch in share]):
            images, labels = self.split.take(batch)
            mine.append(self.right(craft(images, labels), labels).cpu())
        shares = distributed.gather(mine)
        rows = [shares[i % len(shares)][i // len(shares)] for i in range(len(batches))]
        left = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.bool)
        if self.notes:
            hits = "".join(map(str, left.int().tolist()))
            distributed.from_main(partial(self.notes.add, key, [(hits, 0.0)]))
        return left
