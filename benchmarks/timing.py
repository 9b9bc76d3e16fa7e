"""What every benchmark shares: contenders timed in turn, medians and ratios, and what they are timed on."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

from utils.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent


def interleaved(contenders, rounds, seconds=0.3):
    """Time functions without arguments in turn, round after round, so that all meet the machine in the same moods.

    contenders: {name: function}. In every round each runs as often as takes about `seconds`, the order turned by one;
    before the first it runs twice, to warm up. Returns {name: the seconds of each round}.
    """
    names, runs, times = list(contenders), {}, {name: [] for name in contenders}
    for name, function in contenders.items():
        function()
        runs[name] = max(1, round(seconds / timed(function)))
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(contenders[name], runs[name]) / runs[name])
    return times


def table(times, images=None):
    """A row for each contender, ours first, from {name: the seconds of each round} with so many images.

    Medians and interquartile ranges, of the seconds and of the ratio to ours in the same round: how many times faster
    ours is.
    """
    ours, *_ = times.values()
    rows = []
    for name, seconds in times.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        task = TaskSpec(name, setup="", num_threads=torch.get_num_threads())
        seconds, ratio = Measurement(1, seconds, task), Measurement(1, ratios, task)
        rows.append(
            {
                "name": name,
                "seconds": seconds.median,
                "seconds_iqr": seconds.iqr,
                "images_per_second": images and images / seconds.median,
                "ratio": ratio.median,
                "ratio_iqr": ratio.iqr,
            }
        )
    return rows


def timed(function, runs=1):
    """Seconds of so many runs; on a GPU, until it has finished."""
    start = timer()
    for _ in range(runs):
        function()
    return timer() - start


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
        print(f"  {row['name']:30}{row['seconds']:10.4f} s{speed:>20}{row['ratio']:9.2f} (IQR {row['ratio_iqr']:.2f})")


@dataclass
class Setting:
    """What is measured on: a trained CNN of width 32, its checkpoint, and the splits, CIFAR-10's or the digits'."""

    checkpoint: Path
    splits: dict
    device: torch.device
    rounds: int

    def network(self, memory_format=torch.channels_last):
        return load_checkpoint(self.checkpoint, self.device).to(memory_format=memory_format)
