"""Formats: what a writer writes, its reader reads; what could surprise is refused; every shipped file loads."""

import json
import os
from threading import Timer

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers.instances import instances
from tests.helpers.project import ROOT
from tests.helpers.warm import finished
from utils import plotting
from utils.checkpoints import read_metadata
from utils.constants import UserError
from utils.evaluation import ATTACKS, Result, report_row
from utils.files import temporary_of, write_atomically
from utils.formats import (
    LONGEST_LINE,
    LONGEST_LOG,
    LONGEST_TEXT,
    AttackRow,
    Check,
    CheckpointHeader,
    DiagnosisReport,
    Document,
    Epoch,
    LogHeader,
    NetworkArguments,
    Note,
    RunState,
    SavedHeader,
    SavedImage,
    SetManifest,
    TestReport,
    TrainingArguments,
    decode,
    decode_lines,
    encode,
    encode_lines,
    parse_json,
    read_document,
    write_document,
)
from utils.quoting import one_line, shown
from utils.runs import read_log

NAMES = st.text(min_size=1, max_size=10)
OPTIONS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=10) | st.lists(st.integers(0, 9))
)
DEFENSES = (
    st.none()
    | NAMES
    | st.builds(
        lambda others, known: {**others, **known},
        st.dictionaries(NAMES, OPTIONS, max_size=2),
        st.fixed_dictionaries({"name": NAMES, "epsilon": st.none() | st.floats(0, 1e6)}),
    )
)
ARGUMENTS = instances(TrainingArguments, defense=DEFENSES)


@st.composite
def headers(draw):
    """Headers whose class names are as many as the classes."""
    names = draw(st.lists(NAMES, min_size=1, max_size=5))
    arguments = NetworkArguments(width=draw(st.integers(1, 256)), num_classes=len(names))
    training = st.none() | ARGUMENTS
    return draw(
        instances(CheckpointHeader, class_names=st.just(names), arguments=st.just(arguments), training=training)
    )


DOCUMENTS = {
    LogHeader: instances(LogHeader, defense=DEFENSES),
    Epoch: instances(Epoch),
    RunState: instances(RunState, arguments=ARGUMENTS),
    CheckpointHeader: headers(),
    SetManifest: instances(SetManifest),
    Note: instances(Note, hits=st.text("01", max_size=300)),
    TestReport: instances(TestReport),
    SavedHeader: instances(SavedHeader),
    SavedImage: instances(SavedImage),
}


def json_lines(folder):
    """The project's own, without those that a user's `make demo` or study of digits has made."""
    return sorted(path for path in (ROOT / folder).rglob("*.jsonl") if not {"demo", "digits"} & set(path.parts))


# ---- what is written can be read ----


@pytest.mark.parametrize("schema", DOCUMENTS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back_equal(schema, data):
    document = data.draw(DOCUMENTS[schema])
    assert decode(encode(document), schema) == document
    assert decode(encode(document, indent=1), schema) == document


@settings(max_examples=20, deadline=None)
@given(header=DOCUMENTS[LogHeader], epochs=st.lists(DOCUMENTS[Epoch], min_size=1, max_size=5))
def test_a_log_that_is_read_can_be_drawn(header, epochs, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    path.write_bytes(encode_lines([header, *epochs]))
    log = read_log(path)
    plotting.plt.close(plotting.training_curve(log, "a log"))


@settings(max_examples=20, deadline=None)
@given(report=DOCUMENTS[TestReport])
def test_a_test_report_that_is_read_can_be_drawn(report):
    plotting.plt.close(plotting.accuracy_against_epsilon(report))


@given(st.sampled_from(list(DOCUMENTS)), st.data())
@settings(max_examples=30, deadline=None)
def test_a_document_with_one_field_out_of_bounds_is_not_written(schema, data):
    document = data.draw(DOCUMENTS[schema])
    field = data.draw(st.sampled_from(document.__struct_fields__))
    spoilt = data.draw(st.sampled_from([float("nan"), float("inf"), -(2 * 10**9), 10**400, object(), "x" * 2**25]))
    # A header that compares two of its fields may fail in Python's own way before it is written.
    with pytest.raises((ValueError, TypeError, AttributeError), match=r"."):
        encode(msgspec.structs.replace(document, **{field: spoilt}))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_report_has_a_field_for_every_option_of_every_attack(attack):
    row = report_row(Result(epsilon=0.1, correct=5, examples=10, seconds=1.0, attack=attack), "white_box")
    row = row if isinstance(row, AttackRow) else AttackRow(**row)
    assert decode(encode(row), AttackRow) == row


@pytest.mark.parametrize("kind", [str, float, int])
def test_numbers_and_texts_of_other_classes_are_written_as_plain_ones(kind):
    """numpy.float64 is a float, and torch.__version__ a str."""
    mine = type("Mine", (kind,), {})
    header = encode(TrainingArguments(**{**PLAIN, "defense": {"name": "mine", "strength": mine("3")}}))
    assert decode(header, TrainingArguments).defense["strength"] == kind("3")


def test_surrogates_that_json_would_join_are_not_written():
    row = {"name": "\ud83d\ude00", "passed": True, "figures": ""}
    with pytest.raises(ValueError, match="would not be read as it was written"):
        encode(Check(**row))
    assert decode(encode(Check(**{**row, "name": "\udcff"})), Check).name == "\udcff"  # a path that is not UTF-8


def test_files_name_their_format(tmp_path):
    report = TestReport(
        checkpoint="a.safetensors",
        network="cnn",
        dataset="digits",
        split="test",
        examples=1,
        clean_accuracy=1.0,
        clean_confidence_interval=(0.2, 1.0),
        attacks=[],
    )
    write_document(tmp_path / "a.json", report)
    assert json.loads((tmp_path / "a.json").read_bytes())["format"] == 1
    assert read_document(tmp_path / "a.json", TestReport, "a test report") == report
    for spoilt in (msgspec.structs.replace(report, clean_accuracy=2.0), msgspec.structs.replace(report, examples=0)):
        with pytest.raises(UserError, match="Expected"):
            write_document(tmp_path / "a.json", spoilt)
    assert read_document(tmp_path / "a.json", TestReport, "a test report") == report


def test_the_longest_log_of_a_training_can_be_read():
    epochs = next(field for field in msgspec.inspect.type_info(TrainingArguments).fields if field.name == "epochs")
    most = getattr(epochs.type, "type", epochs.type).le
    third = 1 / 3
    accuracies = {name: third for name in Epoch.__struct_fields__ if name.endswith("_accuracy")}
    longest = Epoch(
        epoch=most, loss=-1e8 - third, precision="bfloat16", seconds=1e6 + third, images_per_second=10**12, **accuracies
    )
    line = encode_lines([longest])
    assert most * len(json.dumps(line.decode())) + LONGEST_LINE < LONGEST_LOG  # also inside the JSON of a header


# ---- what was written before ----


@pytest.mark.parametrize("path", json_lines("models") + json_lines("results"), ids=lambda path: path.stem)
def test_every_shipped_log_loads(path):
    lines = decode_lines(path.read_bytes(), LogHeader, Epoch)
    assert len(lines) > 1
    assert decode_lines(encode_lines(lines), LogHeader, Epoch) == lines


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.safetensors")), ids=lambda path: path.stem)
def test_every_shipped_header_loads(path):
    header = read_metadata(path)
    assert decode(encode(header), CheckpointHeader) == header


@pytest.mark.parametrize(
    "path",
    [ROOT / "results" / "cnn.json", ROOT / "results" / "cnn-lstm.json", *(ROOT / "results/diagnosis").glob("*.json")],
    ids=lambda path: path.stem,
)
def test_every_shipped_test_report_loads(path):
    report = read_document(path, TestReport, "a test report")
    assert decode(encode(report), TestReport) == report
    assert isinstance(report.diagnosis, DiagnosisReport) == (path.parent.name == "diagnosis")


PLAIN = {
    "network": "cnn",
    "width": 4,
    "dataset": "digits",
    "examples": 10,
    "seed": 0,
    "optimizer": "sgd",
    "lr": 0.1,
    "warmup": None,
    "epochs": 1,
    "batch_size": 1,
    "weight_decay": 0,
    "label_smoothing": 0,
    "shift": 0,
}


@pytest.mark.parametrize(
    ("defense", "name", "epsilon"),
    [
        (None, None, None),
        ("mine", "mine", None),
        ({"name": "label-noise", "rate": 0.1}, "label-noise", None),
        ({"name": "n-fgsm", "epsilon": 8 / 255, "noise": 2}, "n-fgsm", 8 / 255),
    ],
)
def test_a_defense_has_a_name_and_perhaps_a_radius(defense, name, epsilon):
    arguments = decode(json.dumps({**PLAIN, "defense": defense}), TrainingArguments)
    assert (arguments.defense_name, arguments.defense_epsilon) == (name, epsilon)


@pytest.mark.parametrize(
    "changed",
    [
        {"defense": 5},
        {"defense": {"epsilon": 0.1}},
        {"defense": {"name": [], "epsilon": 0.1}},
        {"defense": {"name": "n-fgsm", "epsilon": "x"}},
        {"defense": {"name": "n-fgsm", "epsilon": 1e308}},
        {"defense": {"name": "n-fgsm", "noise": 1e999}},
        {"width": None},
        {"width": True},
        {"width": 4.0},
        {"width": 10**9},
        {"seed": 2**64},
        {"lr": 1e999},
        {"unknown": 1},
    ],
)
def test_training_arguments_out_of_bounds_are_refused(changed):
    with pytest.raises(ValueError, match=r"Expected|unknown") as error:
        decode(json.dumps({**PLAIN, **changed}).replace("Infinity", "1e999"), TrainingArguments)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


EPOCH = {"epoch": 1, "loss": 1.5, "validation_accuracy": 1, "seconds": 0, "images_per_second": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("seconds", -1), ("loss", 1e999), ("loss", 1e300), ("loss", None), ("validation_accuracy", 1.1), ("epoch", 0)],
)
def test_an_epoch_that_no_table_could_show_is_neither_read_nor_written(name, value):
    assert decode(json.dumps(EPOCH), Epoch) == Epoch(**EPOCH)
    with pytest.raises(ValueError, match=f"{name}: Expected"):
        decode(json.dumps({**EPOCH, name: value}).replace("Infinity", "1e999"), Epoch)
    with pytest.raises(ValueError, match=f"{name}: Expected"):
        encode(Epoch(**{**EPOCH, name: value}))


# ---- texts of strangers ----


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


@pytest.mark.parametrize("schema", [CheckpointHeader, SetManifest, TestReport, RunState, LogHeader])
def test_a_file_of_a_newer_format_says_so(schema):
    with pytest.raises(ValueError, match=r"^it has format 2, newer than 1: a newer version of this code wrote it$"):
        decode('{"format": 2, "and": "whatever follows"}', schema)
    for version in (0, -1, True, "2", 10**5000, None):
        with pytest.raises(ValueError, match=r"."):
            decode(
                json.dumps({"format": version}) if version != 10**5000 else '{"format": 1' + "0" * 5000 + "}", schema
            )


@pytest.mark.parametrize(
    "data", [b"\xff", b"\xef\xbb\xbf{}", '{"format": 1}'.encode("utf-16"), b"null", b"[]", b"1e999"]
)
@pytest.mark.parametrize("schema", DOCUMENTS)
def test_what_is_not_an_object_in_utf_8_is_refused(data, schema):
    with pytest.raises(ValueError, match=r"."):
        decode(data, schema)


@given(st.text(max_size=500))
@example('"\x1b[2J\n": 1')
@example('"' + "y" * 10_000 + '": 1')
@settings(max_examples=30, deadline=None)
def test_a_reason_is_short_and_printable(text):
    for hostile in (text, "{" + text + "}", json.dumps({text: 1}), json.dumps({"attack": text})):
        with pytest.raises(ValueError, match=r"^.{1,400}$") as error:
            decode(hostile, SetManifest)
        assert one_line(error.value).isprintable()


class Anything(Document, frozen=True, kw_only=True):
    """A document of one text."""

    text: str


@pytest.mark.parametrize(("longer", "refused"), [(0, False), (1, True)])
def test_long_json_is_not_parsed(longer, refused, tmp_path):
    path, frame = tmp_path / "a.json", '{"text": ""}'
    path.write_text(json.dumps({"text": "x" * (LONGEST_TEXT - len(frame) + longer)}))
    if refused:
        with pytest.raises(UserError, match=r"a\.json is not a text \(it is longer than 1,048,576 bytes\)"):
            read_document(path, Anything, "a text")
    else:
        assert read_document(path, Anything, "a text").text.endswith("x")


def test_long_lines_are_not_parsed():
    line = json.dumps(EPOCH).encode()
    assert len(decode_lines(line + b" " * (LONGEST_LINE - len(line)), Epoch, Epoch)) == 1
    with pytest.raises(ValueError, match="longer than 65,536 bytes"):
        decode_lines(line + b" " * (LONGEST_LINE - len(line) + 1), Epoch, Epoch)


def test_a_file_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.json cannot be read: No such file or directory"):
        read_document(tmp_path / "a.json", TestReport, "a test report")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes among its files")
@pytest.mark.parametrize("read", [lambda path: read_document(path, TestReport, "a report"), read_metadata, read_log])
def test_a_pipe_that_nobody_closes_is_not_read(read, tmp_path):
    os.mkfifo(tmp_path / "a")
    # A reader that waits for the end gets it after all, and fails.
    writer = Timer(20, lambda: os.close(os.open(tmp_path / "a", os.O_WRONLY | os.O_NONBLOCK)))
    writer.start()
    with pytest.raises(UserError, match="it is not a file"):
        read(tmp_path / "a")
    assert writer.is_alive()
    writer.cancel()


def test_a_link_at_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    temporary_of(tmp_path / "a").symlink_to("precious")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()


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


@pytest.mark.skipif(os.name == "nt", reason="memory is measured as Unix does")
@pytest.mark.parametrize(  # `make torture` tries thousands
    ("kind", "mutations"),
    [("checkpoints", 100), ("sets", 25), ("studies", 25), ("robustness", 25), ("logs", 15), ("tests", 10)],
)
def test_mutated_files_are_read_or_refused(kind, mutations):
    """In a process of its own, so that its memory can be measured."""
    result = finished("tests.helpers.hostile", kind, mutations, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    tally = json.loads(result.stdout)
    assert (tally["lost"], tally["executed"], tally["first_loss"]) == (0, 0, "")
    assert tally["tried"] == tally["survived"] == mutations
    assert tally["accepted"] > 0  # some mutations leave the file valid, or the fuzzer would prove little
    assert tally["accepted"] < mutations / 2
