"""Kill, fuzz and starve, at full size: is anything lost, does anything of a stranger's run?

    make torture

prints a line for each experiment, writes results/torture.json (TortureReport) and its table in docs/reliability.md, and
ends with status 1 if anything was lost or executed. An error that ends in a traceback counts as lost.
One seed gives all random numbers; only how far a process has come when it is killed differs from run to run.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from tests.helpers import faults
from tests.helpers.hostile import SECONDS, Tally, Watch
from tests.helpers.project import ROOT, command, untraced
from utils.adversarial_sets import FOLDER
from utils.checkpoints import load_checkpoint, read_header, read_tensors, versions
from utils.data import DataError, load_split, tensor_digest
from utils.files import write_atomically
from utils.formats import Count, Document, Name, Record, RunState, Seconds, SetManifest, Text, Versions, write_document
from utils.notes import read_notes
from utils.tables import markdown

PAGE = Path("docs") / "reliability.md"
BEFORE_THE_TABLE = "([results/torture.json](../results/torture.json)):"  # in PAGE, which ends with the table
OUTPUT = Path("a.safetensors")
TRAINING = ("train-cnn.py", "--dataset", "digits", "--epochs", 20, "--width", 4)
RESUMED = (*TRAINING, "--output", OUTPUT, "--resume")
DEFENDED = (*TRAINING[:4], 3, *TRAINING[5:], "--defense", "fgsm-augment", "--epsilon", 0.1)
TESTING = ("test-cnn.py", "--attack", "pgd", "--steps", 30, "--restarts", 3, "--examples", 200, "--batch-size", 10)


class Experiment(Record, frozen=True, kw_only=True):
    """What the report says of one experiment: the fields of a Tally."""

    name: Text
    tried: Count
    survived: Count
    lost: Count
    executed: Count  # tries during which something of a file's ran, or wrote
    mebibytes: Annotated[float, Meta(ge=0, le=1e9)] = 0.0  # by which the process grew
    slowest: Seconds = 0.0
    accepted: Count = 0  # of the files that survived, those that were read as something valid
    first_loss: Text = ""


class TortureReport(Document, frozen=True, kw_only=True):
    """results/torture.json."""

    python: Name
    system: Text
    versions: Versions
    experiments: list[Experiment]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=float, default=1, help="of the tries, for a quick look that writes nothing")
    args = parser.parse_args()
    rows = []
    for name, experiment, tries in EXPERIMENTS:
        with tempfile.TemporaryDirectory() as folder:
            tally = experiment(max(1, round(args.part * tries)), random.Random(0), Path(folder))
        if tally is None:
            print(f"{name}: not run, CIFAR-10 is not here")
            continue
        rows.append({"name": name, **asdict(tally)})
        print("{name}: tried {tried:,}, survived {survived:,}, lost {lost}, executed {executed}".format(**rows[-1]))
        if tally.first_loss:
            print(f"    {tally.first_loss}")
        sys.stdout.flush()
    if args.part == 1:
        about = {"python": platform.python_version(), "system": platform.platform(), "versions": versions("hypothesis")}
        write(ROOT, TortureReport(**about, experiments=[Experiment(**row) for row in rows]))
    sys.exit(any(row["lost"] or row["executed"] for row in rows))


def write(root, report):
    """Write results/torture.json, and its table at the end of docs/reliability.md."""
    write_document(root / "results" / "torture.json", report)
    before, _ = (root / PAGE).read_text(encoding="utf-8").split(BEFORE_THE_TABLE)
    write_atomically(root / PAGE, f"{before}{BEFORE_THE_TABLE}\n\n{torture_table(report)}\n".encode())


def started(arguments, folder, preexec_fn=None, **environment):
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
        env={**untraced(), **environment},
    )


def finish(arguments, folder):
    """Run to the end. Raises RuntimeError, with what it said, if that is not a good one."""
    process = started(arguments, folder)
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}: {errors[-300:]}")


def wait(process, condition):
    """Until the condition holds; False if the process has ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0002)
    return True


def a_line(process, beginning):
    """Whether such a line of its output comes."""
    return any(line.startswith(beginning) for line in process.stdout)


def interrupted(tries, arguments, folder, output, moment, kept, *, gain=1, end=signal.SIGKILL):
    """Start, interrupt at a moment, start again, so many times; at last run to the end: a Tally.

    moment(process): waits for it, False if the process has ended before it came; then all begins anew.
    kept(): how much is on the disk after an interruption, such as finished epochs; raises whatever is wrong with it. By
    the moment, it must be `gain` more than after the interruption before. At the end the output must be that of a run
    which nobody interrupted, byte for byte, and beside it only what that leaves.
    """
    tally, whole, broken = Tally(), folder / "whole", folder / "broken"
    for place in (whole, broken):
        place.mkdir()
        for source in folder.glob("*.safetensors"):
            shutil.copy(source, place)
    finish(arguments, whole)
    expected = contents(whole / output)
    before = 0
    for _ in range(20 * tries):  # of which most would do, and not for ever if the moment never comes
        if tally.tried == tries:
            break
        # As in a terminal, even where this is a background job, which ignores SIGINT.
        process = started(
            arguments, broken, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        )
        if not moment(process):
            process.communicate()
            for path in (broken / output).parent.glob(f"{output.stem}*"):
                path.unlink()
            before = 0
            continue
        process.send_signal(end)
        _, errors = process.communicate(timeout=60)
        trouble = ""
        try:
            now = kept()
            if now < before + gain:
                trouble = f"{now} of what was {before} and then {gain} more"
            before = 0 if now == math.inf else now  # what is finished begins anew
        except Exception as error:
            trouble = repr(error)
        # What was finished already may be interrupted in Python's own end.
        if end == signal.SIGINT and process.returncode != 130 and not (broken / output).exists():
            trouble = trouble or f"status {process.returncode}: {errors[-200:]}"
        tally.count(trouble)
    trouble = "" if tally.tried == tries else "the moment did not come"
    try:
        finish(arguments, broken)
        if contents(broken / output) != expected:
            trouble = f"{output} is another"
        elif names(broken) != names(whole):
            trouble = f"there is more, or less: {names(broken) ^ names(whole)}"
    except RuntimeError as error:
        trouble = str(error)
    if trouble:
        tally.lost, tally.survived, tally.first_loss = tally.lost + 1, tally.survived - 1, tally.first_loss or trouble
    return tally


def contents(path):
    """Of a file; of a report, all but its seconds."""
    if path.suffix != ".json":
        return path.read_bytes()
    report = json.loads(path.read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in report["attacks"]]


def names(folder):
    """Of all files, but for the locks of dead processes, which whoever takes them next removes."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def epochs(folder):
    """How many of the training that is interrupted there are finished, and can be read; infinity if all are."""
    output = folder / "broken" / OUTPUT
    state = output.with_suffix(".partial.safetensors")
    count = len(read_header(state, RunState).epochs) if state.exists() else 0
    if output.exists():
        load_checkpoint(output)
        return math.inf
    return count


def train_a_source(folder):
    """A checkpoint for an attack, and nothing else."""
    finish((*TRAINING[:4], 2, *TRAINING[5:], "--output", folder / "source.safetensors"), folder)
    (folder / "source.jsonl").unlink()


# ---- the experiments: (tries, random numbers, an empty folder) -> Tally ----


def killed_in_a_step(tries, draw, folder, end=signal.SIGKILL):
    def moment(process):
        came = a_line(process, "epoch")
        time.sleep(draw.uniform(0, 0.3))
        return came and process.poll() is None

    return interrupted(tries, RESUMED, folder, OUTPUT, moment, lambda: epochs(folder), end=end)


def interrupted_once(tries, draw, folder):
    return killed_in_a_step(tries, draw, folder, signal.SIGINT)


def killed_in_a_write(tries, draw, folder):
    temporary = folder / "broken" / f".{OUTPUT.stem}.partial.safetensors.tmp"

    def moment(process):
        temporary.unlink(missing_ok=True)  # of the kill before
        for _ in range(draw.randint(1, 4)):  # writes
            if not (wait(process, temporary.exists) and wait(process, lambda: not temporary.exists())):
                return False
        return wait(process, temporary.exists)

    return interrupted(tries, RESUMED, folder, OUTPUT, moment, lambda: epochs(folder))


def killed_in_building_a_set(tries, draw, folder):
    """While the set's lock is held, which is as long as it is built and written; the first run tells how long."""
    train_a_source(folder)
    arguments = (*DEFENDED, "--source", "source.safetensors", "--output", OUTPUT, "--resume")
    kept = folder / "broken" / FOLDER / "digits-train-fgsm-source.safetensors"
    lock = kept.with_name(f".{kept.name}.lock")
    durations = []

    def moment(process):
        for path in (kept, lock):  # the latter of the kill before
            path.unlink(missing_ok=True)
        if not wait(process, lock.exists):
            return False
        start = time.monotonic()
        if not durations:
            wait(process, kept.exists)
            durations.append(time.monotonic() - start)
            return False
        time.sleep(draw.uniform(0, 1) * durations[0])
        return process.poll() is None

    def intact():
        if kept.exists():
            manifest, planes = read_tensors(kept, SetManifest)
            if manifest.sha256 != tensor_digest(planes["positive"], planes["negative"]):
                raise ValueError(f"{kept.name} does not fit its checksum")
        return epochs(folder)

    return interrupted(tries, arguments, folder, OUTPUT, moment, intact, gain=0)  # as yet there is no epoch


def killed_in_an_evaluation(tries, draw, folder):
    train_a_source(folder)
    report = Path("out.json")
    notes = folder / "broken" / "out.json.attacks.partial.jsonl"

    def file():
        """Which file the notes are at the moment, and its size."""
        try:
            status = notes.stat()
            return status.st_ino, status.st_size
        except FileNotFoundError:
            return None, 0

    def moment(process):
        """A batch more than there is once it has written anew what it has read of the notes before."""
        before, _ = file()
        came = wait(process, lambda: file()[0] not in (None, before))
        _, size = file() if before else (None, 0)
        came = came and wait(process, lambda: file()[1] > size)
        time.sleep(draw.uniform(0, 0.2))
        return came and process.poll() is None

    def kept():
        if (folder / "broken" / report).exists():
            (folder / "broken" / report).unlink()
            return math.inf
        return len(read_notes(notes)) if notes.exists() else 0

    arguments = (*TESTING, "--epsilon", 0.05, 0.1, "--checkpoint", "source.safetensors", "--json", report)
    return interrupted(tries, arguments, folder, report, moment, kept)


def full_disk(tries, draw, folder):
    """No file may become larger than so many bytes: one line, and what was there before is there still."""
    tally = Tally()
    for index in range(tries):
        place = folder / str(index)
        place.mkdir()
        (place / OUTPUT).write_bytes(b"earlier")
        limit = draw.randrange(100_000)  # the state has about 70,000 bytes, the checkpoint 30,000

        def starve(limit=limit):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        arguments = (*TRAINING[:4], 2, *TRAINING[5:], "--output", OUTPUT, "--overwrite", "--quiet")
        # A .pyc cut off at the limit would stay.
        process = started(arguments, place, preexec_fn=starve, PYTHONDONTWRITEBYTECODE="1")
        _, errors = process.communicate(timeout=120)
        trouble = ""
        if process.returncode and (
            process.returncode != 1 or errors.count("\n") != 1 or "File too large" not in errors
        ):
            trouble = f"status {process.returncode}: {errors[-300:]}"
        elif process.returncode and (place / OUTPUT).read_bytes() != b"earlier":
            trouble = "the earlier checkpoint is gone"
        if process.returncode == 0:
            try:
                load_checkpoint(place / OUTPUT)
            except Exception as error:
                trouble = repr(error)
        tally.count(trouble)
    return tally


def hostile_data(tries, draw, folder):
    """CIFAR-10's own pickles, one of them damaged or exchanged for another: none is opened."""
    from torchvision.datasets import CIFAR10

    data_dir = ROOT / (os.environ.get("DATA_DIR") or "data") / CIFAR10.base_folder
    if not data_dir.is_dir():
        return None
    files, tally, watch = sorted(data_dir.glob("*batch*")), Tally(), Watch()
    copies = folder / CIFAR10.base_folder
    copies.mkdir()
    for file in files:
        (copies / file.name).symlink_to(file.resolve())
    for _ in range(tries):
        file = draw.choice(files)
        data = bytearray(file.read_bytes())
        kind = draw.choice(["flip", "cut", "exchange", "longer"])
        if kind == "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[draw.randrange(len(data)) :]
        elif kind == "exchange":
            data = draw.choice([other for other in files if other != file]).read_bytes()
        else:
            data += b"\0"
        (copies / file.name).unlink()
        (copies / file.name).write_bytes(data)
        trouble = "it was read"
        with watch.watching():
            try:
                load_split("cifar10", "train", folder)
            except DataError as error:
                trouble = "" if file.name in str(error) else str(error)
        tally.executed += bool(watch.seen)
        watch.seen.clear()
        tally.count(trouble)
        (copies / file.name).unlink()
        (copies / file.name).symlink_to(file.resolve())
    return tally


def mutated(kind):
    """The fuzzer of tests.helpers.hostile, in a process of its own."""

    def experiment(tries, draw, folder):
        command = [sys.executable, "-m", "tests.helpers.hostile", kind, str(tries)]
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120 + SECONDS * tries
            )
        except subprocess.TimeoutExpired:
            return Tally(tried=tries, lost=tries, first_loss="it hangs")
        with contextlib.suppress(ValueError):
            return Tally(**json.loads(result.stdout))
        return Tally(tried=tries, lost=tries, first_loss=result.stderr[-300:])  # a crash of the interpreter, say

    return experiment


EXPERIMENTS = [
    ("SIGKILL in a training step", killed_in_a_step, 10),
    ("SIGKILL in a checkpoint's write", killed_in_a_write, 8),
    ("SIGKILL while an adversarial set is built", killed_in_building_a_set, 6),
    ("SIGKILL in an evaluation", killed_in_an_evaluation, 6),
    ("Ctrl-C in a training step", interrupted_once, 5),
    ("disk full", full_disk, 10),
    ("mutated checkpoints", mutated("checkpoints"), 4000),
    ("mutated adversarial sets", mutated("sets"), 2000),
    ("mutated reports of a study", mutated("studies"), 2000),
    ("mutated reports on robustness", mutated("robustness"), 2000),
    ("mutated logs of trainings", mutated("logs"), 2000),
    ("mutated test reports", mutated("tests"), 2000),
    ("mutated notes of evaluations", mutated("notes"), 2000),
    ("mutated states of trainings", mutated("states"), 2000),
    ("mutated lists of saved images", mutated("saved"), 2000),
    ("mutated .npz files", mutated("arrays"), 2000),
    ("mutated pictures", mutated("pictures"), 1000),
    ("mutated files of weights", mutated("weights"), 2000),
    ("mutated files like CIFAR-10's", mutated("batches"), 2000),
    ("damaged CIFAR-10 files", hostile_data, 30),
    *faults.EXPERIMENTS,
]


def torture_table(report):
    """A row for each experiment of a TortureReport."""
    rows = [
        [row.name, *(f"{getattr(row, column):,}" for column in ("tried", "survived", "lost", "executed"))]
        for row in report.experiments
    ]
    return markdown(["what was tried", "times", "survived", "lost", "code executed, files written"], rows)


if __name__ == "__main__":
    main()
