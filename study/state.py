"""What is done of the plan: the checkpoints and the report on the disk, compared with what is wanted."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from study.formats import StudyEntry
from study.plan import Line, Planned
from utils.adversarial_sets import AugmentedSplit
from utils.checkpoints import file_digest, read_metadata
from utils.commands.checkpoints import overwrite_advice
from utils.constants import UserError
from utils.data import Split
from utils.evaluation import ATTACK_VERSIONS
from utils.formats import TrainingArguments
from utils.runs import PartialRun, argument_differences, check_same_arguments, training_arguments


@dataclass
class State:
    """Answers which networks are trained and tested. The study adds to `entries` after each test."""

    plan: list[Line]
    entries: dict[str, StudyEntry]  # by name, of the report
    training: Split
    width: int
    overwrite: bool  # retrain networks that were trained with other arguments instead of raising UserError

    def remaining(self) -> list[Planned]:
        """The networks that are not yet trained or not yet tested, in order. Raises UserError as `is_trained` does."""
        return [
            planned
            for line in self.plan
            if not self.is_line_done(line)
            for planned in line
            if not (self.is_trained(planned) and self.is_tested(planned))
        ]

    def is_line_done(self, line: Line) -> bool:
        """Whether all networks of a line are tested and their checkpoints are not needed any more."""
        return not line[0].is_kept and all(map(self.is_tested, line))

    def is_tested(self, planned: Planned) -> bool:
        """Whether the report has this checkpoint's figures; without a checkpoint, those of the wanted training.

        Figures of another version of FGSM do not count.
        """
        entry = self.entries.get(planned.name)
        if entry is None or entry.attack_version != ATTACK_VERSIONS["fgsm"]:
            return False
        if planned.path.exists() and entry.sha256 != file_digest(planned.path):
            return False
        return self._is_taken_as_it_is(planned) or not self._differences(planned)

    def is_trained(self, planned: Planned) -> bool:
        """Whether the finished checkpoint is there.

        Raises UserError if the file there is damaged or of another training; with `overwrite`, that is False.
        """
        if planned.epsilon is not None and not planned.baseline.exists():
            return False
        if self.is_resumable(planned):
            return False
        if self._is_taken_as_it_is(planned):
            self._check_fits(planned)
            return True
        return planned.path.exists() and not PartialRun(planned.path).exists() and self._is_wanted(planned)

    def is_resumable(self, planned: Planned) -> bool:
        """Whether there is an interrupted run of the wanted training. Raises UserError as `is_trained` does."""
        return PartialRun(planned.path).exists() and self._is_wanted(planned, interrupted=True)

    def check_baselines_are_there(self) -> None:
        """Raise UserError if a retrained network is there but its baseline, which would be trained anew, is gone."""
        for line in self.plan:
            baseline, *retrained = line
            orphans = [planned.path for planned in retrained if planned.path.exists()]
            if orphans and not baseline.path.exists() and not self.is_line_done(line):
                raise UserError(
                    f"{orphans[0]} is there, but not {baseline.path}, on whose examples it was trained: put that file "
                    f"back, {overwrite_advice(orphans[0], 'trains them all again')}or --models names another folder"
                )

    def check_no_figures_are_lost(self, report: Path, todo: Iterable[Planned]) -> None:
        """Raise UserError if the report has figures of a missing checkpoint that would be trained in another way."""
        gone = [planned for planned in todo if planned.name in self.entries and not planned.path.exists()]
        for planned in gone:
            if differences := self._differences(planned):
                raise UserError(
                    f"{report} has figures of {planned.path} from another training: {'; '.join(differences)}; "
                    f"{overwrite_advice(report, 'replaces them')}--results names another folder"
                )

    def _is_taken_as_it_is(self, planned: Planned) -> bool:
        """Whether any training is good enough: the study takes a shipped baseline however it was trained."""
        return planned.epsilon is None and planned.is_kept and planned.path.exists()

    def _check_fits(self, planned: Planned) -> None:
        """Raise UserError if a baseline that is taken as it is has another architecture, width or data set."""
        header = read_metadata(planned.path)
        wanted = planned.architecture, self.training.dataset, self.width
        if (header.network, header.dataset, header.arguments.width) != wanted:
            raise UserError(
                f"{planned.path} is not a {planned.architecture} of width {self.width} trained on "
                f"{self.training.dataset}"
            )

    def _is_wanted(self, planned: Planned, *, interrupted: bool = False) -> bool:
        """Whether the checkpoint, or the interrupted run beside it, is of the wanted training."""
        run = PartialRun(planned.path)
        path = run.state if interrupted else planned.path
        source = None if planned.epsilon is None else file_digest(planned.baseline)
        try:
            found = run.header().arguments if interrupted else read_metadata(planned.path).training
            check_same_arguments(path, found, self._arguments(planned, source))
        except UserError as error:
            if self.overwrite:
                return False
            raise UserError(
                f"{error}; {overwrite_advice(path, 'trains it again')}--models or --scratch names another folder"
            ) from None
        return True

    def _differences(self, planned: Planned) -> list[str]:
        """The differences between the training that the report tells of and the wanted one, a phrase each."""
        source = self.entries.get(planned.baseline.stem)
        wanted = self._arguments(planned, source.sha256 if source else None)
        return argument_differences(self.entries[planned.name].training, wanted)

    def _arguments(self, planned: Planned, source_sha256: str | None) -> TrainingArguments:
        """The wanted training. source_sha256: of the baseline; None if that is not known."""
        training: Split | AugmentedSplit = self.training
        if planned.epsilon is not None:  # only its description is needed, so it gets no directions
            training = AugmentedSplit(self.training, torch.empty(0), planned.epsilon, source_sha256 or "unknown")
        return training_arguments(planned.architecture, training, planned.recipe, width=self.width, seed=planned.seed)
