"""Faults on purpose: file calls that fail or kill, threads, hostile texts, and commands in odd surroundings.

    python -m tests.helpers.faults training kill 20

lets a short training fail at 20 of its calls of file functions and prints a Tally as JSON.
"""

import contextlib
import errno
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import filelock  # noqa: F401, so that the forked processes need not import it
import torch
import torch._dynamo
from msgspec.structs import replace

from attacks import pgd
from attacks.modules import modules_of
from benchmarks.tables import contenders_table
from networks import CNN
from study import tables
from study.formats import read_robustness
from tests.helpers.hostile import Tally
from tests.helpers.project import QUICK, ROOT, command, untraced
from utils import files
from utils.adversarial_sets import adversarial_set
from utils.checkpoints import load_checkpoint, read_header, save_checkpoint
from utils.constants import UserError
from utils.data import Split
from utils.evaluation import evaluate, report_row
from utils.formats import RunState, SetManifest, TestReport, read_document, write_document
from utils.notes import notes_beside, read_notes
from utils.recipes import RECIPES
from utils.runs import read_log
from utils.tables import markdown
from utils.training import train

CALLS = {"open", "close", "fsync", "replace", "unlink", "stat", "fstat", "lstat", "chmod", "makedirs", "rmdir"}
FAILED, TRACEBACK = 3, 4  # how a run ends: with an error that a command shows as one line, or with another one
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</td><script>x</script>",
    "a\x1b[2Jb",
    "a|b\n# c",
    "[a](javascript:x)",
    "$x$",
)


# ---- the k-th call of a file function ----


class Faulty:
    """Stands for `os` and `open` in utils.files. It counts their calls, and fails or kills at the one numbered `at`."""

    def __init__(self, at=0, kill=False):
        self.at, self.kill, self.calls = at, kill, 0

    def __getattr__(self, name):
        found = getattr(os, name)
        return functools.partial(self.call, found) if name in CALLS else found

    def call(self, function, *arguments, **options):
        if self.is_now():
            self.fail()
        return function(*arguments, **options)

    def is_now(self):
        self.calls += 1
        return self.calls == self.at

    def fail(self):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.EIO, "Input/output error")

    def open_file(self, *arguments, **options):
        return FaultyFile(self, self.call(open, *arguments, **options))

    @contextlib.contextmanager
    def installed(self):
        files.os, files.open = self, self.open_file
        try:
            yield
        finally:
            files.os = os
            del files.open


class FaultyFile:
    """A file whose `write` may write one half only."""

    def __init__(self, faulty, file):
        self.faulty, self.file = faulty, file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        if self.faulty.is_now():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            self.faulty.fail()
        return self.file.write(data)


def in_a_child(run, folder, faulty):
    """Run in a forked process: (its status, or -9 if it was killed, and how many calls it made, or its error)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status, told = 0, ""
        try:
            with faulty.installed():
                run(folder)
            told = str(faulty.calls)
        except (OSError, UserError) as error:
            status, told = FAILED, repr(error)
        except BaseException as error:
            status, told = TRACEBACK, repr(error)
        os.write(writer, told[:4000].encode())
        os._exit(status)
    os.close(writer)
    _, ended = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return os.waitstatus_to_exitcode(ended), pipe.read()


def some_images(name="train", count=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split("digits", name, images, torch.arange(count) % 10, tuple("0123456789"))


def a_training(folder):
    recipe = replace(RECIPES["paper"], epochs=2, batch_size=6)
    splits = some_images(), some_images("validation")
    train("cnn", *splits, recipe, output=folder / "a.safetensors", width=1, resume=True, quiet=True)


def an_evaluation(folder):
    network, split, path = load_checkpoint(folder / "source.safetensors"), some_images("test"), folder / "out.json"
    notes = notes_beside(path)
    result = evaluate(network, split, "pgd", 0.1, options={"steps": 1}, batch_size=4, notes=notes)
    about = {"checkpoint": "a", "network": "cnn", "dataset": "digits", "split": "test", "examples": 12}
    about |= {"clean_accuracy": 1.0, "clean_confidence_interval": (0.0, 1.0)}
    write_document(path, TestReport(**about, attacks=[report_row(result, "white_box", per_image=True)]))
    notes.finish()


def a_set(folder):
    adversarial_set(folder / "source.safetensors", some_images(), folder=folder / "sets")


RUNS = {"training": a_training, "evaluation": an_evaluation, "set": a_set}


def what_is_there(folder):
    """(how much of the work is done, what there is apart from times). Raises whatever is wrong with a file."""
    done, found = 0, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."):
        name = str(path.relative_to(folder))
        if name.endswith(".partial.safetensors"):
            done = max(done, len(read_header(path, RunState).epochs))
        elif name.startswith("sets/"):
            manifest = read_header(path, SetManifest)
            done, found[name] = math.inf, manifest.sha256
        elif path.suffix == ".safetensors":
            load_checkpoint(path)
            found[name] = path.read_bytes()
            done = done if name.startswith("source") else math.inf
        elif name.endswith(".attacks.partial.jsonl"):
            done = max(done, len(read_notes(path)))
        elif path.suffix == ".jsonl":
            found[name] = len(read_log(path).epochs)
        else:
            (row,) = read_document(path, TestReport, "a test report").attacks
            done, found[name] = math.inf, row.hits
    return done, found


def fail_at_every_call(kind, kill, tries):
    """A run that fails at its first call, one that fails at its second, and so on, each followed by a run that goes on.

    tries: if there are more calls, only so many of them are tried, evenly spaced.
    """
    run, tally = RUNS[kind], Tally()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "source"
        folder.mkdir()
        torch.manual_seed(0)
        about = {"dataset": "digits", "class_names": list("0123456789")}
        if kind != "training":
            save_checkpoint(folder / "source.safetensors", CNN(width=4), about)

        def fresh(name):
            place = Path(parent) / name
            place.mkdir()
            for path in folder.iterdir():
                (place / path.name).write_bytes(path.read_bytes())
            return place

        whole = fresh("whole")
        status, calls = in_a_child(run, whole, Faulty())
        if status:
            raise RuntimeError(calls)
        expected, before = what_is_there(whole), 0
        count = min(tries, int(calls))
        for k in sorted({1 + index * int(calls) // count for index in range(count)}):
            place, trouble = fresh(str(k)), ""
            status, told = in_a_child(run, place, Faulty(k, kill))
            try:
                done, _ = what_is_there(place)
                if status == TRACEBACK:
                    trouble = told
                elif done < before:
                    trouble = f"{done} of what was {before}"
                before = done
                status, told = in_a_child(run, place, Faulty())
                if status or what_is_there(place) != expected:
                    trouble = trouble or f"the next run does not go on: {told}"
            except Exception as error:
                trouble = repr(error)
            tally.count(trouble and f"call {k}: {trouble[:300]}")
    return tally


def faults(kind, end):
    """An experiment: `fail_at_every_call` in a process of its own. end: "error" or "kill"."""

    def experiment(tries, draw, folder):
        arguments = [sys.executable, "-m", "tests.helpers.faults", kind, end, str(tries)]
        environment = {**untraced(), "OMP_NUM_THREADS": "1"}  # because the process forks
        result = subprocess.run(
            arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60 + 30 * tries
        )
        with contextlib.suppress(ValueError):
            return Tally(**json.loads(result.stdout))
        return Tally(tried=tries, lost=tries, first_loss=result.stderr[-300:])

    return experiment


# ---- threads and texts ----


def attacked_by_threads(tries, draw, folder):
    """Two threads attack one model at the same time, again and again; then it is as it was before."""
    tally, network, split = Tally(), CNN(width=1).train(), some_images()
    images, labels = split.take(torch.arange(len(split)))
    expected = pgd(network, images, labels, epsilon=0.1, steps=2, seed=0)
    for _ in range(tries):
        found = []

        def attack(delay, found=found):
            time.sleep(delay)
            found.append(pgd(network, images, labels, epsilon=0.1, steps=2, seed=0))

        threads = [threading.Thread(target=attack, args=(draw.uniform(0, 0.01),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        changed = [module for module in modules_of(network) if not module.training]
        changed += [parameter for parameter in network.parameters() if not parameter.requires_grad]
        other = len(found) < 2 or not all(torch.equal(each, expected) for each in found)
        trouble = f"{len(changed)} of its parts are changed" if changed else "another result" * other
        trouble = trouble or "cuDNN is off" * (not torch.backends.cudnn.enabled)
        tally.count(trouble)
    return tally


def hostile_texts(tries, draw, folder):
    """Reports and logs whose texts are HTML, Markdown or commands to a terminal, as the tables that a browser shows."""
    tally = Tally()
    robustness = read_robustness(ROOT / "results" / "robustness.json")
    log = read_log(ROOT / "models" / "cnn-robust.jsonl")
    diagnosed = read_document(ROOT / "results" / "diagnosis" / "cnn.json", TestReport, "a test report")
    for _ in range(tries):
        text = draw.choice(HOSTILE) + draw.choice(["", "x", *HOSTILE])
        named = replace(log.arguments, network=text, defense={"name": text, "epsilon": 0.1})
        entries = [replace(entry, training=named) for entry in robustness.entries]
        diagnosis = replace(diagnosed.diagnosis, verdict=text)
        made = [
            tables.robustness_table(replace(robustness, entries=entries)),
            tables.training_table([log._replace(arguments=named)]),
            tables.cost_table({text: (CNN(width=1), log)}),
            tables.diagnosis_table([replace(diagnosed, checkpoint=text, diagnosis=diagnosis)]),
            contenders_table([]),
            markdown([text], [[text]]),
        ]
        tally.count(next((f"{text!r} is not escaped" for table in made if not is_harmless(table)), ""))
    return tally


def is_harmless(table):
    """Whether a Markdown table holds no HTML, link or formula outside code, and no control character anywhere."""
    lines = [re.sub(r"\\.", "", line) for line in table.splitlines()]  # without what a backslash makes plain
    outside = "".join("".join(line.split("`")[::2]) for line in lines).replace("<br>", "")
    one_shape = len({line.count("|") for line in lines}) == 1
    return one_shape and all(map(str.isprintable, lines)) and not any(mark in outside for mark in ("<", "](java", "$"))


# ---- commands in odd surroundings ----

TRAIN, TEST, MODEL = ("train-cnn.py", *QUICK), ("test-cnn.py", "--examples", 5), ("test-model.py", "--examples", 5)
LONG = "n" * 240
# name: (the command, its environment). In the folder are a pipe called "pipe", a loop of links called "loop", a folder
# without pictures called "empty" and somebody's checkpoint called "a.partial.safetensors".
ODD = {
    "a pipe as a checkpoint": ((*TEST, "--checkpoint", "pipe"), {}),
    "a pipe as a source": ((*TRAIN, "--defense", "fgsm-augment", "--epsilon", 0.1, "--source", "pipe"), {}),
    "a pipe as first weights": ((*TRAIN, "--init", "pipe"), {}),
    "a pipe as images": ((*MODEL, "--model", "resnet18", "--data", "pipe"), {}),
    "a pipe as weights": ((*MODEL, "--model", "resnet18", "--data", "digits", "--weights", "pipe"), {}),
    "a pipe as classes": ((*MODEL, "--model", "resnet18", "--data", "empty", "--classes", "pipe"), {}),
    "a pipe as a report": ((*TEST, "--json", "pipe"), {}),
    "standard input as a checkpoint": ((*TEST, "--checkpoint", "/dev/stdin"), {}),
    "a pipe as a batch of CIFAR-10": (("train-cnn.py", "--data-dir", "piped"), {}),
    "a line break in a path": ((*TRAIN, "--output", "a\nb.safetensors"), {}),
    "a command to the terminal in a path": ((*TEST, "--json", "\x1b[2J.json"), {}),
    "an empty path": ((*TEST, "--json", ""), {}),
    "a name without room for the state's": ((*TRAIN, "--output", f"{LONG}.safetensors"), {}),
    "a report's name that is too long": ((*TEST, "--json", f"{LONG * 2}.json"), {}),
    "a loop of links as an output": ((*TRAIN, "--output", "loop/a.safetensors"), {}),
    "a loop of links as images": ((*TRAIN, "--data", "loop"), {}),
    "a folder without pictures": ((*TRAIN, "--data", "empty"), {}),
    "the name of a state": ((*TRAIN, "--output", "b.partial.safetensors"), {}),
    "the name of a state, as a report": ((*TEST, "--json", "b.partial.jsonl"), {}),
    "a checkpoint where the state goes": ((*TRAIN, "--output", "a.safetensors", "--overwrite"), {}),
    "an invalid WORLD_SIZE": (TRAIN, {"WORLD_SIZE": "many"}),
    "a WORLD_SIZE of 5,000 digits": (TRAIN, {"WORLD_SIZE": "1" * 5000}),
    "an invalid RANK": (TRAIN, {"WORLD_SIZE": "2", "RANK": "first"}),
    "a RANK that is too large": (TRAIN, {"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0", "MASTER_PORT": "1"}),
    "a WORLD_SIZE without its companions": (TRAIN, {"WORLD_SIZE": "2"}),
}


def odd_surroundings(tries, draw, folder):
    """Each ends within a minute, with status 2 and one line, and changes no file."""
    tally = Tally()
    (folder / "empty").mkdir()
    (folder / "piped" / "cifar-10-batches-py").mkdir(parents=True)
    for pipe in (folder / "pipe", folder / "piped" / "cifar-10-batches-py" / "data_batch_1"):
        os.mkfifo(pipe)
    (folder / "loop").symlink_to("loop")
    save_checkpoint(
        folder / "a.partial.safetensors", CNN(width=1), {"dataset": "digits", "class_names": list("0123456789")}
    )
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}
    for name in list(ODD) if tries >= len(ODD) else draw.sample(list(ODD), tries):
        arguments, environment = ODD[name]
        process = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            errors = "it hangs"
        is_one_line = process.returncode == 2 and errors.count("\n") == 1 and errors[:-1].isprintable()
        after = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}
        trouble = "" if is_one_line else f"status {process.returncode}: {errors[-300:]}"
        trouble = trouble or "files were changed" * (after != before)
        tally.count(trouble and f"{name}: {trouble}")
    return tally


EXPERIMENTS = [
    *(
        (f"{title} at a file call of {kind}", faults(kind.split()[-1], end), 400)
        for title, end in (("an error", "error"), ("SIGKILL", "kill"))
        for kind in ("a training", "an evaluation", "an adversarial set")
    ),
    ("two threads that attack one model", attacked_by_threads, 100),
    ("HTML, Markdown and control characters in files", hostile_texts, 200),
    ("commands in odd surroundings", odd_surroundings, 100),
]

if __name__ == "__main__":
    kind, end, tries = sys.argv[1:]
    warnings.simplefilter("ignore")  # of networks that have learnt nothing
    print(json.dumps(asdict(fail_at_every_call(kind, end == "kill", int(tries)))))
