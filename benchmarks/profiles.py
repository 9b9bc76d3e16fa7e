"""Where the time goes: which operations a step of N-FGSM and the steps of PGD consist of."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from attacks import pgd
from benchmarks.attacks import EPSILON, STEPS, robust_images
from benchmarks.timing import Setting
from benchmarks.training import faster_precision, our_epoch
from defenses.losses import NFGSM
from utils.constants import ARCHITECTURES, RADIUS, TITLES
from utils.recipes import RECIPES

KINDS = {  # of operations: parts of torch's names for them
    "convolution": ("convolution",),
    "batch norm": ("batch_norm",),
    "activation": ("silu", "threshold", "clamp_min"),
    "LSTM": ("rnn", "lstm"),
    "matrix product": ("::mm", "addmm"),
}


def measure(setting: Setting) -> dict[str, dict[str, float]]:
    """The section "profile": what runs -> kind of operation -> its share of the CPU's time in all operations.

    N-FGSM with the recipe `robust`, in the faster precision; PGD in float32.
    """
    precision, width = faster_precision(setting), setting.pick(96, 4)
    training = setting.splits["train"].first(setting.pick(1280, 64))
    validation = setting.splits["validation"].first(10)
    attacked = setting.splits["train"].first(setting.pick(500, 50)).to(setting.device)
    recipe, device = RECIPES["robust"], setting.device
    profiled: dict[str, Callable[[], Any]] = {
        f"training a CNN of width {width} with N-FGSM in {precision}": partial(
            our_epoch, training, validation, NFGSM(RADIUS), recipe, device, width=width, precision=precision
        )
    }
    pgd_20: dict[str, Any] = {"epsilon": EPSILON, "steps": setting.pick(STEPS, 2), "random_start": False}
    for name in ARCHITECTURES:
        network = setting.network(name)
        profiled[f"PGD on the {TITLES[name]}"] = partial(pgd, network, *robust_images(network, attacked), **pgd_20)
    report = {}
    print("\nwhere the time goes")
    for what, run in profiled.items():
        report[what] = shares(run)
        print(f"  {what}: {', '.join(f'{kind} {share:.0%}' for kind, share in report[what].items())}", flush=True)
    return report


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """The share of each kind of operation in the CPU's time when `run` is called a second time, the largest first."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if "::" in event.key:  # torch also lists the steps of the profiler and the optimiser
            times[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: time / times.total() for kind, time in times.most_common()}


def kind_of(operation: str) -> str:
    """The first kind with a part that occurs in the operation's name, or "other"."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), "other")
