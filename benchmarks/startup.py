"""How long it takes until something answers: --help, and the import of the attacks beside torch's own."""

import subprocess
import sys

from benchmarks.timing import ROOT, interleaved, say, table

COMMANDS = {
    "train-cnn.py --help": [str(ROOT / "train-cnn.py"), "--help"],
    "test-cnn.py --help": [str(ROOT / "test-cnn.py"), "--help"],
    "import attacks": ["-c", "import attacks"],
    "import torch": ["-c", "import torch"],
    "import torchattacks": ["-c", "import torchattacks"],
}


def measure(setting):
    def starter(arguments):
        return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)

    names = list(COMMANDS)[: setting.pick(None, 2)]
    rows = table(interleaved({name: starter(COMMANDS[name]) for name in names}, setting))
    say("start-up", rows)
    return rows
