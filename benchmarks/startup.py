"""How long it takes until something answers: --help, and the import of the attacks beside torch's own import."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.formats import Contender
from benchmarks.timing import Setting, compared, interleaved, say
from utils.constants import ROOT

COMMANDS = {
    "--help": {
        "train-cnn.py --help": [str(ROOT / "train-cnn.py"), "--help"],
        "test-cnn.py --help": [str(ROOT / "test-cnn.py"), "--help"],
        "Python alone": ["-c", "pass"],
    },
    "import": {
        "import attacks": ["-c", "import attacks"],
        "import torch": ["-c", "import torch"],
        "import torchattacks": ["-c", "import torchattacks"],
    },
}


def measure(setting: Setting) -> dict[str, list[Contender]]:
    """The section "startup" of the report."""

    def starter(arguments: list[str]) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)

    report = {}
    for title, commands in COMMANDS.items():
        names = list(commands)[: setting.pick(None, 2)]
        report[title] = compared(interleaved({name: starter(commands[name]) for name in names}, setting))
        say(f"start-up: {title}", report[title])
    return report
