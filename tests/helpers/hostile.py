"""Thousands of hostile files: do our readers read or refuse mutated checkpoints, adversarial sets, logs and reports?

    python -m tests.helpers.hostile checkpoints 2000

prints a Tally as JSON. A file survives if it is read as something valid or refused in one line, within two seconds.
The process may grow by 1 GiB at most, and audit hooks watch that no code runs and nothing is written.
"""

import contextlib
import functools
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from networks import CNN
from study import tables
from study.formats import read_robustness, read_whole_study
from tests.helpers.project import ROOT
from utils import plotting
from utils.adversarial_sets import read_set
from utils.checkpoints import (
    CheckpointError,
    load_checkpoint,
    read_metadata,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from utils.constants import UserError
from utils.data import tensor_digest, unpickled
from utils.formats import (
    LONGEST_LOG,
    LONGEST_TEXT,
    RunState,
    SavedHeader,
    SavedImage,
    SetManifest,
    TestReport,
    TrainingArguments,
    encode_lines,
    read_document,
)
from utils.images import read_images
from utils.models import load_weights
from utils.notes import Notes, read_notes
from utils.runs import read_log
from utils.saving import LINES as LIST
from utils.saving import load_images

SECONDS, MEBIBYTES = 2, 1024
HOLE = 2**36  # bytes, most of which are nowhere on the disk
WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
RUNS = {"pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
# What a leaf of a JSON value may be replaced by.
LEAVES = [None, True, -1, 0, 3, 1.5, 10**400, 2**63, -0.0, 1e308, "", "x", "\x1b[2J\n", "\ud800", "y" * 10_000]
LEAVES += [[], {}, [[]], ["a"] * 10, {"a": 1}, [1e999], float("nan"), float("inf")]
TEXTS = [
    "",
    "null",
    "[]",
    "{",
    '{"a": 1, "a": 2}',
    "[" * 990,
    "[" * 980 + "]" * 980,
    '{"network": ' + "[" * 960 + "]" * 960 + "}",
]
TEXTS += ["1" * 5000, "[NaN]", '{"network": "cnn", "arguments": {"width": 1e400}}', "[" + "[]," * 300_000 + "[]]"]


@dataclass
class Tally:
    """tried = survived + lost. executed: of all, those during which something was run or written."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    executed: int = 0
    mebibytes: float = 0.0  # by which the process grew
    slowest: float = 0.0  # seconds
    accepted: int = 0  # of those that survived, read as something valid
    first_loss: str = ""

    def count(self, trouble):
        """One more try. trouble: what was lost, if anything."""
        self.tried += 1
        self.lost, self.survived = self.lost + bool(trouble), self.survived + (not trouble)
        self.first_loss = self.first_loss or trouble


class Watch:
    """Counts what is run and written while it is on; an audit hook cannot be removed."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.on and (event in WRITES | RUNS or self._is_a_write(event, arguments)):
            self.seen.append(event)

    @staticmethod
    def _is_a_write(event, arguments):
        flags = arguments[2] if event == "open" and len(arguments) > 2 else 0
        if arguments[:1] == (tempfile.gettempdir(),):  # a file without a name, in which a reader keeps pictures
            return False
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    @contextlib.contextmanager
    def watching(self):
        self.on = True
        try:
            yield
        finally:
            self.on = False


class Hostile:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (os.path.join(tempfile.gettempdir(), f"it-ran-{os.getpid()}"),)


# ---- mutations of any file ----


def flipped(draw, data):
    data = bytearray(data)
    # The header is a small part of the file, and the more interesting one.
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, min(draw(st.sampled_from([8, 2000, len(data)])), len(data)) - 1))] ^= 1 << draw(
            st.integers(0, 7)
        )
    return bytes(data)


def cut(draw, data):
    return data[: draw(st.integers(0, len(data) - 1))] + draw(st.sampled_from([b"", b"\0" * 64, b"{}"]))


def swapped(draw, data):
    a, b, c, d = sorted(draw(st.integers(0, len(data))) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def a_pickle(draw, data):
    live = pickle.dumps(Hostile(), draw(st.integers(0, 5)))
    return draw(st.sampled_from([live, live + data, data + live, b"PK\x03\x04" + live]))


ANYWHERE = [flipped, cut, swapped, a_pickle]


# ---- mutations of a safetensors file ----


def parts(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, data, declared=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def a_tensor(draw, header):
    return draw(st.sampled_from(sorted(name for name in header if name != "__metadata__")))


def other_shape_or_dtype(draw, data):
    header, data = parts(data)
    entry = header[a_tensor(draw, header)]
    shapes = [[], [0], [1], [-1], [2**31], [2**63], [2**32, 2**32], [2**40], [1.5], ["1"], None, entry["shape"] * 20]
    entry["shape"] = draw(st.sampled_from([*shapes, entry["shape"][::-1]]))
    entry["dtype"] = draw(
        st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E8M0", "F4", "C64", "X"])
    )
    return joined(header, data)


def other_offsets(draw, data):
    """Overlapping, reversed, beyond the end."""
    header, data = parts(data)
    entry, other = (header[a_tensor(draw, header)] for _ in range(2))
    begin, end = other["data_offsets"]
    entry["data_offsets"] = draw(
        st.sampled_from([[begin, end], [begin + 4, end + 4], [end, begin], [0, 2**62], [begin, 2**64 - 1], [-4, 0], []])
    )
    return joined(header, data)


def other_names(draw, data):
    header, data = parts(data)
    names = ["", "\x1b[2J", "../../a", "n" * 100_000, "__metadata__", "normalize.mean", "é\n"]
    header[draw(st.sampled_from(names))] = header.pop(a_tensor(draw, header))
    return joined(header, data)


def many_tensors(draw, data):
    header, data = parts(data)
    count = draw(st.sampled_from([1, 1000, 3000, 200_000]))  # the last too many for the longest header that is read
    return joined(b"{" + empty_tensors(count) + json.dumps(header).encode()[1:], data)


@functools.cache
def empty_tensors(count):
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    return "".join(f'"{i}": {entry}, ' for i in range(count)).encode()


def other_sizes(draw, data):
    """A header that declares to be longer, or shorter, than it is."""
    header, data = parts(data)
    return joined(header, data, draw(st.sampled_from([0, 1, 2, 100, 10**6, 10**8, 2**31, 2**62, 2**64 - 1])))


def spoilt_numbers(draw, data):
    """NaN, infinity and other ends of the range in place of some weights, with everything else as it was."""
    header, data = parts(data)
    begin, end = header[a_tensor(draw, header)]["data_offsets"]
    spoilt = struct.pack("<f", draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -0.0])))
    at = begin + 4 * draw(st.integers(0, max((end - begin) // 4 - 1, 0)))
    return joined(header, data[:at] + spoilt + data[at + 4 :])


def a_hole(draw, data):
    """A tensor of gigabytes that the file does hold, as far as its length says; the disk does not."""
    header, data = parts(data)
    name = draw(st.sampled_from(["hole", "positive", "classifier.bias"]))
    header.pop(name, None)
    entry = {"dtype": draw(st.sampled_from(["F32", "U8"])), "shape": [], "data_offsets": [len(data), HOLE]}
    entry["shape"] = [(HOLE - len(data)) // {"F32": 4, "U8": 1}[entry["dtype"]]]
    file = joined({**header, name: entry}, data)
    return file, len(file) - len(data) + HOLE


def other_metadata(draw, data):
    header, data = parts(data)
    kind = draw(st.sampled_from(["leaf", "text", "keys", "values"]))
    if kind == "leaf":
        header["__metadata__"]["checkpoint"] = changed_json(draw, header["__metadata__"]["checkpoint"])
    elif kind == "text":
        header["__metadata__"]["checkpoint"] = draw(st.sampled_from(TEXTS))
    elif kind == "keys":
        header["__metadata__"] = draw(
            st.sampled_from([{}, {"other": "1"}, {"": ""}, {str(i): "" for i in range(1000)}])
        )
    else:
        header["__metadata__"] = draw(st.sampled_from([None, [], 1, "a", {"checkpoint": 1}, {"checkpoint": None}]))
    return joined(header, data)


SAFETENSORS = [
    *ANYWHERE,
    other_shape_or_dtype,
    other_offsets,
    other_names,
    many_tensors,
    other_sizes,
    spoilt_numbers,
    a_hole,
    other_metadata,
    other_metadata,  # twice, for it has the most to choose from
]


# ---- mutations of JSON ----


def changed_json(draw, text):
    """One of its values, at any depth, replaced by another or gone."""
    value = json.loads(text)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return json.dumps(value)
        key = draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    if draw(st.integers(0, 5)) == 0:
        del node[key]
    else:
        node[key] = draw(st.sampled_from(LEAVES))
    return json.dumps(value)


def other_json(draw, data):
    return changed_json(draw, data.decode()).encode("utf-8", "surrogatepass")


def other_text(draw, data):
    return draw(st.sampled_from(TEXTS)).encode()


def too_long(draw, data):
    return data, draw(st.sampled_from([LONGEST_TEXT + 1, LONGEST_LOG + 1, HOLE]))


def other_line(draw, data):
    lines = data.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(st.sampled_from([other_json, other_json, other_text]))(draw, lines[at])
    return b"\n".join(lines)


LINES = [*ANYWHERE, other_line, other_line, other_line, too_long]
JSON = [*ANYWHERE, other_json, other_json, other_json, other_text, too_long]


@st.composite
def mutations(draw, data, kinds):
    """(bytes, the length of the file), one mutation of data or two in a row."""
    size = None
    for _ in range(draw(st.integers(1, 2))):
        try:
            changed = draw(st.sampled_from(kinds))(draw, data)
        except (ValueError, KeyError, TypeError, LookupError, struct.error, AttributeError):
            break  # the first has left nothing that the second could change
        data, size = changed if isinstance(changed, tuple) else (changed, size)
    return data, size


# ---- the files, and what a reader owes ----


def checkpoints(folder):
    """A checkpoint, its mutations, and a function that reads one."""
    path = folder / "cnn.safetensors"
    torch.manual_seed(0)
    training = read_metadata(ROOT / "models" / "cnn-robust.safetensors").training
    about = {"dataset": "digits", "class_names": list("0123456789"), "training": training, "epochs": 3}
    save_checkpoint(path, CNN(width=4), {**about, "precision": "bfloat16", "validation_accuracy": 0.5})

    def read():
        network = load_checkpoint(path)
        classes = network.arguments["num_classes"]
        assert not network.training
        logits = network(torch.zeros(1, 3, 32, 32))
        assert logits.shape == (1, classes)
        assert logits.isfinite().all()

    return path, SAFETENSORS, read, CheckpointError


def sets(folder):
    path, shape = folder / "set.safetensors", torch.Size((5, 3, 32, 32))
    wanted = {
        "attack": "fgsm",
        "source_sha256": "0" * 64,
        "dataset": "digits",
        "split": "test",
        "split_sha256": "1" * 64,
        "batch_size": 250,
        "versions": {"torch": "2"},
    }
    plane = torch.arange(-(-shape.numel() // 8)).to(torch.uint8)
    planes = {"positive": plane, "negative": ~plane}
    digest = tensor_digest(planes["positive"], planes["negative"])
    write_tensors(path, planes, SetManifest(**wanted, sha256=digest, seconds=1.0))
    expected = read_set(path, wanted, shape).direction

    def read():
        assert torch.equal(read_set(path, wanted, shape).direction, expected)

    return path, SAFETENSORS, read, CheckpointError


def report(folder, name, read):
    """A copy of a shipped report, its mutations, and a function that reads it and makes what notebooks show."""
    path = folder / Path(name).name
    shutil.copy(ROOT / "results" / name, path)
    return path, JSON, read, UserError


def studies(folder):
    def read():
        found = read_whole_study(folder / "study.json")
        for name in ("cnn", "cnn-lstm"):
            tables.transfer_table(found, name)
        for table in (tables.ahead_table, tables.spread_table, tables.conclusion_table, tables.document):
            table(found)

    return report(folder, "study.json", read)


def robustness_reports(folder):
    whole = read_whole_study(ROOT / "results" / "study.json")

    def read():
        found = read_robustness(folder / "robustness.json")
        tables.robustness_table(found)
        tables.conclusion_table(whole, found)

    return report(folder, "robustness.json", read)


def test_reports(folder):
    path = folder / "cnn.json"

    def read():
        found = read_document(path, TestReport, "a test report")
        plotting.plt.close(plotting.accuracy_against_epsilon(found))

    return report(folder, "diagnosis/cnn.json", read)


def logs(folder):
    path, network = folder / "cnn-robust.jsonl", CNN(width=4)
    head, *epochs = (ROOT / "models" / path.name).read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([head, *epochs[:2]]) + "\n", encoding="utf-8")

    def read():
        log = read_log(path)
        plotting.plt.close(plotting.training_curve(log, "a log"))
        tables.cost_table({"a network": (network, log)})

    return path, LINES, read, UserError


def notes(folder):
    path = folder / "notes.jsonl"
    Notes(path).add("a" * 64, [("0110", 0.5)] * 5)
    return path, LINES, lambda: read_notes(path), UserError


def states(folder):
    path = folder / "a.partial.safetensors"
    log = read_log(ROOT / "models" / "cnn-robust.jsonl")
    fields = {name: getattr(log.arguments, name) for name in TrainingArguments.__struct_fields__}
    state = RunState(arguments=TrainingArguments(**fields), epochs=log.epochs[:2])
    write_tensors(path, {"network.a": torch.zeros(3)}, state)
    # A state is its owner's: it may have any size, and a header of 64 MiB.
    kinds = [kind for kind in SAFETENSORS if kind not in (a_hole, many_tensors)]
    return path, kinds, lambda: read_tensors(path, RunState), UserError


def saved_images(folder):
    """The list of saved examples; the pictures that it names are not there."""
    path = folder / LIST
    header = {"attack": "pgd", "epsilon": 0.1, "batch_size": 2, "channels": 3, "class_names": ["a", "b"]}
    header |= {"clean_accuracy": 1.0, "accuracy": 0.5, "misclassified": 1, "survived": 1}
    line = SavedImage(file="00000.png", label=0, before=0, after=1, linf=0.1, l2=1.0)
    path.write_bytes(encode_lines([SavedHeader(**header), line, line]))
    return path, LINES, lambda: _unless_refused(lambda: load_images(folder)), UserError


def _unless_refused(read):
    """Read what is refused even when it is intact, because other files are missing."""
    with contextlib.suppress(FileNotFoundError):
        try:
            read()
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise


def arrays(folder):
    path = folder / "images.npz"
    np.savez(path, images=np.zeros((4, 3, 8, 8), np.float32), labels=np.arange(4))
    return path, ANYWHERE, lambda: read_images(path), UserError


def pictures(folder):
    path = folder / "one class" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    return path, ANYWHERE, lambda: read_images(folder), UserError


def weights(folder):
    path, network = folder / "a.pth", torch.nn.Linear(3, 2)
    torch.save(network.state_dict(), path)
    return path, ANYWHERE, lambda: load_weights(network, path), UserError


def batches(folder):
    """A file like CIFAR-10's own; its checksum, which would refuse each mutation, is not asked."""
    path = folder / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 4))
    return path, ANYWHERE, lambda: unpickled(path.read_bytes()), ValueError


KINDS = {
    "notes": notes,
    "states": states,
    "saved": saved_images,
    "arrays": arrays,
    "pictures": pictures,
    "weights": weights,
    "batches": batches,
    "checkpoints": checkpoints,
    "sets": sets,
    "studies": studies,
    "robustness": robustness_reports,
    "logs": logs,
    "tests": test_reports,
}


def fuzz(kind, examples):
    """Let the readers of a kind of file read so many mutations of one: a Tally."""
    import resource

    tally, watch = Tally(), Watch()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, kinds, read, refusal = KINDS[kind](Path(folder))
        read()  # and so import what is imported late
        intact, before = path.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @seed(0)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations(intact, kinds))
        def each(mutation):
            data, size = mutation
            path.write_bytes(data)
            if size is not None:
                os.truncate(path, size)
            tally.tried += 1
            tally.accepted += attempt(read, refusal, path, tally, watch)

        each()
        tally.mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if tally.mebibytes > MEBIBYTES:
            tally.lost, tally.survived = tally.lost + 1, tally.survived - 1
            tally.first_loss = tally.first_loss or f"grew by {tally.mebibytes:.0f} MiB"
    tally.executed += (Path(tempfile.gettempdir()) / f"it-ran-{os.getpid()}").exists()
    return tally


def attempt(read, refusal, path, tally, watch):
    """Whether the file is read, refused or worse: counted in the tally, True if read."""
    accepted, loss, before = False, "", state(path)
    start = time.process_time()  # and not what other processes take; who hangs is timed out
    try:
        with watch.watching():
            read()
        accepted = True
    except refusal as error:
        if not str(error).isprintable() or len(str(error)) > 1000:
            loss = f"no line to be shown: {error!r}"
    except Exception as error:
        loss = repr(error)
    seconds = time.process_time() - start
    tally.slowest = max(tally.slowest, seconds)
    if seconds > SECONDS:
        loss = loss or f"{seconds:.1f} s"
    if [*path.parent.iterdir()] != [path] or state(path) != before:
        watch.seen.append("the folder changed")
    if watch.seen:
        tally.executed += 1
        loss = loss or ", ".join(watch.seen)
        watch.seen.clear()
    tally.lost, tally.survived = tally.lost + bool(loss), tally.survived + (not loss)
    if loss and not tally.first_loss:
        tally.first_loss = f"mutation {tally.tried}: {loss[:300]}"
    return accepted and not loss


def state(path):
    stat = path.stat()
    return stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns


if __name__ == "__main__":
    print(json.dumps(asdict(fuzz(sys.argv[1], int(sys.argv[2])))))
