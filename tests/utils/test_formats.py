"""Files of strangers: thousands of mutations, read or refused, and what each mended hole looked like."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from threading import Timer

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import CNN, NETWORKS
from study import tables
from study.formats import read_robustness, read_study, read_whole_study
from tests.helpers.project import ROOT
from utils.checkpoints import (
    DTYPES,
    LARGEST_HEADER,
    CheckpointError,
    file_digest,
    load_checkpoint,
    read_metadata,
    read_tensors,
    save_checkpoint,
)
from utils.constants import LARGEST_WIDTH, UserError
from utils.files import LARGEST, temporary_of, write_atomically
from utils.formats import check_numbers, check_strings, is_number, parse_json, read_json, read_json_lines
from utils.quoting import one_line, shown
from utils.runs import argument_differences

METADATA = {"dataset": "digits", "class_names": list("0123456789")}


@pytest.mark.skipif(os.name == "nt", reason="memory is measured as Unix does")
@pytest.mark.parametrize(
    ("kind", "mutations"), [("checkpoints", 2000), ("sets", 500), ("studies", 500), ("robustness", 500), ("logs", 300)]
)
def test_mutated_files_are_read_or_refused(kind, mutations):
    """In a process of its own, whose memory is then theirs."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hostile", kind, str(mutations)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    tally = json.loads(result.stdout)
    assert (tally["lost"], tally["executed"], tally["first_loss"]) == (0, 0, "")
    assert tally["tried"] == tally["survived"] == mutations
    assert tally["accepted"] > 0  # some mutations leave the file valid, or the fuzzer would prove little
    assert tally["accepted"] < mutations / 2


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "cnn.safetensors", CNN(width=4), METADATA)
    return tmp_path / "cnn.safetensors"


def test_hole_of_terabytes_is_not_read(saved):
    """A header of a few bytes that fits the file's length, nearly all of which is nowhere on the disk."""
    data = saved.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    length = len(data) - 8 - size
    header["hole"] = {"dtype": "U8", "shape": [2**36 - length], "data_offsets": [length, 2**36]}
    text = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    os.truncate(saved, 8 + len(text) + 2**36)
    with pytest.raises(CheckpointError, match="'hole' is unknown"):
        load_checkpoint(saved)


WIDEST = """
import resource, sys, time
from utils.checkpoints import CheckpointError, load_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_checkpoint(sys.argv[1])
before, start = peak(), time.perf_counter()
try:
    load_checkpoint(sys.argv[2])
except CheckpointError as error:
    print(error, peak() - before, time.perf_counter() - start, sep="\\n")
"""


@pytest.mark.skipif(os.name == "nt", reason="memory is measured as Unix does")
@pytest.mark.parametrize("network", NETWORKS)
def test_widest_network_takes_neither_long_nor_much_memory(network, saved, tmp_path):
    """A header that says all the right things, and a hole for weights: all that a few bytes can ask for."""
    with torch.device("meta"):
        tensors = NETWORKS[network](LARGEST_WIDTH).state_dict()
    metadata = {"network": network, "arguments": {"width": LARGEST_WIDTH, "num_classes": 10}, **METADATA}
    header, end = {"__metadata__": {"checkpoint": json.dumps(metadata)}}, 0
    for name, tensor in tensors.items():
        dtype, begin, end = DTYPES[tensor.dtype], end, end + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "widest.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    command = [sys.executable, "-c", WIDEST, saved, path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    error, kibibytes, seconds = result.stdout.splitlines()
    assert "logits are NaN or infinite" in error  # for the standard deviations are 0
    assert int(kibibytes) < 2**20
    assert float(seconds) < 2


@pytest.mark.parametrize(
    ("tensor", "value"), [("running_var", -1.0), ("std", 0.0), ("weight", 3e38), ("weight", float("nan"))]
)
def test_numbers_that_make_no_network_are_refused(tensor, value, saved):
    state = load_file(saved)
    name = next(name for name in state if name.endswith(tensor))
    save_file(
        {**state, name: torch.full_like(state[name], value)}, saved, {"checkpoint": json.dumps(read_metadata(saved))}
    )
    with pytest.raises(CheckpointError, match="NaN or infinit"):
        load_checkpoint(saved)


def test_metadata_as_long_as_may_be_take_no_two_seconds(saved):
    """They are valid, and parsed more than once."""
    metadata = {**read_metadata(saved), "training": {"a": [{}] * 80_000}}
    save_file(load_file(saved), saved, {"checkpoint": json.dumps(metadata, separators=(",", ":"))})
    start = time.process_time()
    load_checkpoint(saved)
    assert time.process_time() - start < 2


def test_digest_of_a_hole_is_not_taken(saved):
    os.truncate(saved, 2**36)
    with pytest.raises(CheckpointError, match="too large"):
        file_digest(saved)


def test_long_json_is_not_parsed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('"' + "x" * (LARGEST - 2) + '"')
    assert len(read_json(path)) == LARGEST - 2
    path.write_text('"' + "x" * (LARGEST - 1) + '"')
    with pytest.raises(ValueError, match="too long"):
        read_json(path)
    path.write_text("[1]\n" + " " * LARGEST + "[2]\n")
    with pytest.raises(ValueError, match="too long"):
        read_json_lines(path)
    assert read_json_lines(path, longest=None) == [[1], [2]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes among its files")
@pytest.mark.parametrize("read", [load_checkpoint, read_metadata, file_digest, read_json, read_json_lines])
def test_pipe_of_which_nobody_writes_the_end_is_not_read(read, tmp_path):
    os.mkfifo(tmp_path / "a")
    # Whoever waits for its end after all has it then, and fails.
    writer = Timer(20, lambda: os.close(os.open(tmp_path / "a", os.O_WRONLY | os.O_NONBLOCK)))
    writer.start()
    with pytest.raises((CheckpointError, OSError), match="it is no file"):
        read(tmp_path / "a")
    writer.cancel()


def test_link_left_where_files_are_written_first_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    temporary_of(tmp_path / "a").symlink_to("precious")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()


DEFENDED = {"width": 4, "defense": {"name": "n-fgsm", "epsilon": 0.1}}


@pytest.mark.parametrize(
    "training",
    [
        {**DEFENDED, "defense": 5},
        {**DEFENDED, "defense": {**DEFENDED["defense"], "epsilon": "x"}},
        {**DEFENDED, "defense": {**DEFENDED["defense"], "epsilon": 1e308}},
        {**DEFENDED, "defense": {**DEFENDED["defense"], "name": []}},
        {**DEFENDED, "width": None},
    ],
)
def test_training_that_no_table_could_name_is_refused(training, saved, tmp_path):
    for valid in (DEFENDED, {"defense": "mine"}, {"width": 4, "defense": {"name": "label-noise", "rate": 0.1}}):
        save_checkpoint(saved, CNN(width=4), {**METADATA, "training": valid})
        assert read_metadata(saved)["training"] == valid
        assert tables.defended({"network": "cnn", "training": valid}).startswith("CNN, ")
    save_checkpoint(saved, CNN(width=4), {**METADATA, "training": training})
    with pytest.raises(CheckpointError, match="training is not what it should be"):
        load_checkpoint(saved)
    for report, read in (("study.json", read_study), ("robustness.json", read_robustness)):
        found = json.loads((ROOT / "results" / report).read_text(encoding="utf-8"))
        found["networks"][0]["training"] = training
        (tmp_path / report).write_text(json.dumps(found))
        with pytest.raises(UserError, match="is no"):
            read(tmp_path / report)


def test_report_that_is_not_whole_is_one_line(tmp_path):
    found = json.loads((ROOT / "results" / "study.json").read_text(encoding="utf-8"))
    networks = found["networks"]
    for changed in ([], networks[1:], [networks[0], *networks]):
        (tmp_path / "study.json").write_text(json.dumps({**found, "networks": changed}))
        with pytest.raises(UserError, match="is not of the whole study"):
            read_whole_study(tmp_path / "study.json")
    (tmp_path / "study.json").write_text(json.dumps({**found, "networks": [{**networks[0], "network": "small-cnn"}]}))
    with pytest.raises(UserError, match="'cnn' is no network of the study"):
        read_study(tmp_path / "study.json")
    report = read_robustness(ROOT / "results" / "robustness.json")
    entry = report["networks"][0]
    for results, count in (([], 0), (entry["results"] * 2, 2)):
        with pytest.raises(UserError, match=f"has {count} results of fgsm"):
            tables.robustness_table({**report, "networks": [{**entry, "results": results}]})


def test_long_header_is_not_parsed(saved):
    saved.write_bytes(struct.pack("<Q", LARGEST_HEADER + 1) + b" " * 100)
    with pytest.raises(CheckpointError, match="its header is too long"):
        read_metadata(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training", [1]),
        ("epochs", "3"),
        ("precision", 32),
        ("versions", "1"),
        ("validation_accuracy", "0.5"),
        ("validation_accuracy", 1.5),
        ("validation_accuracy", True),
    ],
)
def test_metadata_of_the_wrong_kind_is_refused(key, value, saved):
    metadata = {**read_metadata(saved), key: value}
    save_file(load_file(saved), saved, {"checkpoint": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=key):
        load_checkpoint(saved)


def test_digest_of_a_file_larger_than_a_block(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert file_digest(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '[{"b": {"a": 1, "a": 1}}]',
        "NaN",
        "[-Infinity]",
        "[" * 21 + "]" * 21,
        "[" * 10**6,
        "1" * 5000,
        "",
    ],
)
def test_json_that_could_surprise_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_other_json_is_what_json_says():
    text = '{"a": [1, 2.5, null, true, "\\ud800"], "b": {"a": {}}}'
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * 20 + "]" * 20)


@pytest.mark.parametrize("value", [True, None, "0.5", float("nan"), float("inf"), 10**400, -1e-9, 1.1, [0.5]])
def test_what_is_no_number_in_the_range(value):
    assert not is_number(value, 0, 1)
    with pytest.raises(ValueError, match="is no number from 0 to 1"):
        check_numbers([0, 1, 0.5, value], 0, 1)


def test_what_is_no_string():
    check_strings(["", "a"])
    with pytest.raises(ValueError, match="None is no string"):
        check_strings(["a", None])


def test_errors_quote_in_short_and_print_no_escapes():
    deep = value = []
    for _ in range(5000):
        value.append([])
        value = value[0]
    bushy = value = []
    for _ in range(8):
        value += [[] for _ in range(10)]
        value[:] = [value[0]] * 10
        value = value[0]
    long = {str(i): i for i in range(1000)}
    for hostile in (deep, bushy, "x" * 10**6, "\x1b[2J\n", long, list(range(1000))):
        assert len(shown(hostile)) <= 200
        assert shown(hostile).isprintable()
    assert one_line(ValueError("a\n  b\x1b[2J" + "c" * 1000)) == "a b?[2J" + "c" * 293


def test_differences_between_trainings_are_quoted_in_short():
    many = {f"{i}\n" * 1000: "x" * 1000 for i in range(1000)}
    differences = argument_differences(many, {})
    assert len(differences) == 21
    assert differences[-1] == "and 982 more"  # with two fields of the recipe that came later
    assert all(len(phrase) < 500 and phrase.isprintable() for phrase in differences)


def test_unknown_dtype_is_refused_before_torch_meets_it(saved):
    metadata = {"checkpoint": json.dumps(read_metadata(saved))}
    save_file({**load_file(saved), "classifier.bias": torch.zeros(10, dtype=torch.complex64)}, saved, metadata)
    with pytest.raises(CheckpointError, match=r"'classifier\.bias' is of a dtype that no checkpoint has"):
        read_tensors(saved)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(saved)
