"""What every benchmark shares: contenders timed in turn, medians and ratios, and what they are timed on."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

from utils.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent
LONGEST = 120  # seconds of a comparison, if three rounds do not take longer


@dataclass
class Setting:
    """What is measured on, and how long."""

    checkpoint: Path  # of a trained CNN of width 32
    splits: dict  # "train", "validation" and "test", of CIFAR-10 or of the digits
    data: list  # the arguments with which a script finds the same
    device: torch.device
    rounds: int  # of each comparison
    quick: bool  # does everything run? seconds, of which no figure means anything

    def pick(self, usual, quick):
        return quick if self.quick else usual

    def network(self, memory_format=torch.channels_last):
        return load_checkpoint(self.checkpoint, self.device).to(memory_format=memory_format)


def interleaved(contenders, setting):
    """Time functions without arguments in turn, round after round, so that all meet the machine in the same moods.

    contenders: {name: function}. In every round each runs as often as takes about 0.3 seconds, the order turned by one.
    Before the first it runs to warm up, twice if that is quick; there are fewer rounds, but three, of slow functions.
    Returns {name: the seconds of each round}.
    """
    runs, a_round = {}, 0
    for name, function in contenders.items():
        seconds = timed(function)
        if seconds < 1:
            seconds = timed(function)
        runs[name] = max(1, round(setting.pick(0.3, 0) / seconds))
        a_round += runs[name] * seconds
    calls = {name: lambda name=name: timed(contenders[name], runs[name]) / runs[name] for name in contenders}
    return in_turn(calls, min(setting.rounds, max(3, int(LONGEST / a_round))))


def in_turn(contenders, rounds):
    """Like `interleaved`, of functions that return seconds, and without the warm-up."""
    names, times = list(contenders), {name: [] for name in contenders}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(contenders[name]())
    return times


def timed(function, runs=1):
    """Seconds of so many runs; on a GPU, until it has finished."""
    start = timer()
    for _ in range(runs):
        function()
    return timer() - start


def table(times, images=None):
    """A row for each contender, ours first, from {name: the seconds of each round} with so many images.

    Medians and interquartile ranges, of the seconds and of the ratio to ours in the same round: how many times faster
    ours is.
    """
    ours, *_ = times.values()
    rows = []
    for name, seconds in times.items():
        task = TaskSpec(name, setup="", num_threads=torch.get_num_threads())
        ratios = Measurement(1, [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)], task)
        seconds = Measurement(1, seconds, task)
        rows.append(
            {
                "name": name,
                "seconds": seconds.median,
                "seconds_iqr": seconds.iqr,
                "images_per_second": images and images / seconds.median,
                "ratio": ratios.median,
                "ratio_iqr": ratios.iqr,
            }
        )
    return rows


def cpu_name():
    """As Linux calls it, else as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def say(title, rows):
    """Print a title and a line for each contender."""
    print(f"\n{title}")
    for row in rows:
        speed = f"{row['images_per_second']:,.0f} images/s" if row["images_per_second"] else ""
        print(
            f"  {row['name']:30}{row['seconds']:10.4f} s{speed:>20}{row['ratio']:9.2f} (IQR {row['ratio_iqr']:.2f})",
            flush=True,
        )
