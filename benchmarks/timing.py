"""What all benchmarks share: contenders timed in turn, medians and ratios."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.benchmark import Measurement, TaskSpec, timer

from benchmarks.formats import Contender
from utils.checkpoints import load_checkpoint
from utils.data import Split

LONGEST = 60  # seconds of a comparison, unless three rounds take longer

Choice = TypeVar("Choice")


@dataclass
class Setting:
    """What is measured, on which machine, and for how long."""

    checkpoints: Mapping[str, Path]  # of trained networks of width 32, by architecture
    splits: Mapping[str, Split]  # "train", "validation" and "test", of CIFAR-10 or of the digits
    data: Sequence[str]  # the arguments with which a script finds the same splits
    device: torch.device
    rounds: int  # of each comparison
    quick: bool  # only see that everything runs, in seconds; no figure means anything

    def pick(self, usual: Choice, quick: Choice) -> Choice:
        """The first value, or the second if this is a quick run."""
        return quick if self.quick else usual

    def network(self, name: str = "cnn", memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
        """The network of a checkpoint, on the device."""
        return load_checkpoint(self.checkpoints[name], self.device).to(memory_format=memory_format)


def interleaved(contenders: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, list[float]]:
    """Time functions in turn, round after round, so that the machine's moods affect all of them alike.

    In every round, each function runs as often as takes about 0.3 seconds; the order shifts by one. Before the first
    round each runs to warm up, twice if it is quick. Slow functions get fewer rounds, but at least three.
    Returns the seconds of one run in each round, by name.
    """
    runs: dict[str, int] = {}
    seconds_of_a_round = 0.0
    for name, function in contenders.items():
        seconds = timed(function)
        if seconds < 1:
            seconds = timed(function)
        runs[name] = max(1, round(setting.pick(0.3, 0) / seconds))
        seconds_of_a_round += runs[name] * seconds

    def one_run(name: str) -> float:
        return timed(contenders[name], runs[name]) / runs[name]

    calls = {name: partial(one_run, name) for name in contenders}
    return rounds_in_turn(calls, min(setting.rounds, max(3, int(LONGEST / seconds_of_a_round))))


def rounds_in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Like `interleaved` without the warm-up, for functions that return their seconds."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(contenders[name]())
    return times


def timed(function: Callable[[], Any], runs: int = 1) -> float:
    """The seconds of so many runs; on a GPU, until it has finished."""
    start = timer()
    for _ in range(runs):
        function()
    return timer() - start


def compared(times: Mapping[str, Sequence[float]], images: int | None = None) -> list[Contender]:
    """A row for each contender, ours first: medians and interquartile ranges of its seconds and of its ratio to ours.

    times: contender -> the seconds of each round. images: how many of them were processed in these seconds.
    """
    ours, *_ = times.values()
    rows = []
    for name, seconds in times.items():
        task = TaskSpec(name, setup="", num_threads=torch.get_num_threads())
        ratios = Measurement(1, [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)], task)
        measured = Measurement(1, list(seconds), task)
        rows.append(
            Contender(
                name=name,
                seconds=measured.median,
                seconds_iqr=measured.iqr,
                images_per_second=images / measured.median if images else None,
                ratio=ratios.median,
                ratio_iqr=ratios.iqr,
            )
        )
    return rows


def say(title: str, rows: Sequence[Contender]) -> None:
    """Print a title and a line for each contender."""
    print(f"\n{title}")
    for row in rows:
        speed = f"{row.images_per_second:,.0f} images/s" if row.images_per_second else ""
        print(
            f"  {row.name:30}{row.seconds:10.4f} s{speed:>20}{row.ratio:9.2f} (IQR {row.ratio_iqr:.2f})",
            flush=True,
        )
