"""The files that utils reads and writes, each described once: its fields, their types and their bounds.

Every schema is a msgspec Struct. `decode` reads JSON that may come from anyone: it refuses unknown and duplicate keys,
NaN, deep nesting, long texts and numbers out of bounds. `encode` reads its own output before anyone stores it, so a
file that was written can be read. Files have a format number, so that an old version of this code can say "this file is
too new" instead of misreading it.
"""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from utils.constants import LARGEST_CLASSES, LARGEST_WIDTH, UserError
from utils.files import read_bytes, write_atomically
from utils.quoting import one_line, shown
from utils.recipes import Recipe

LONGEST_TEXT = 2**20  # bytes of JSON; parsing as many hostile ones takes a fifth of a second
LONGEST_LINE = 2**16  # bytes of a line in a file of JSON lines
LONGEST_LOG = 2**26  # bytes, some 200,000 epochs
DEEPEST = 20  # levels of nesting; our files have five, and Python fails to compare values beyond some hundreds

# ---- types with bounds ----

Count = Annotated[int, Meta(ge=0, le=10**9)]
Positive = Annotated[int, Meta(ge=1, le=10**9)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Interval = tuple[Fraction, Fraction]  # low, high: 95 % confidence
Radius = Annotated[float, Meta(ge=0, le=1e6)]  # in pixel units; above 1, an L-infinity radius changes nothing more
Norm = Literal["linf", "l2"]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]  # of one epoch, batch or adversarial set
TotalSeconds = Annotated[float, Meta(ge=0, le=1e18)]  # a sum of them
LARGEST_LOSS = 1e9
Loss = Annotated[float, Meta(ge=-LARGEST_LOSS, le=LARGEST_LOSS)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Width = Annotated[int, Meta(ge=1, le=LARGEST_WIDTH)]
LONGEST_NAME = 200  # characters
Name = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]  # of a class, data set, network, attack
Text = Annotated[str, Meta(max_length=10_000)]  # a sentence or a path
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
# A character for each image, in order: "1" if it is correct, "0" if it is wrong. Under an attack with a target, "t" if
# it is classified as its target, and "-" if its label is the target, so that it is not counted.
Hits = Annotated[str, Meta(pattern=r"^[01t-]*\Z")]
# The same; "z" if it is correct, and the attack has met gradients of zero in its batch.
NotedHits = Annotated[str, Meta(pattern=r"^[01tz-]*\Z")]
# Why an accuracy may be far above what the strongest attack would leave. Every accuracy under an attack is an upper
# bound of the robust accuracy. Where one of these holds, there is a known reason to distrust it as an estimate.
UpperBound = Literal[
    "one step",  # of FGSM; steps that follow the gradient further find more
    "zero gradient",  # the attack could not follow the gradient of some images that are left
    "random",  # the network is: an attack follows one answer, and another one is judged
    "batch dependent",  # the network's answer to an image depends on the other images
    "changes",  # the network changes while it is attacked
    "probabilities",  # the network returns them, and where they round to 0 or 1 the gradient vanishes
    "transferred",  # the examples were crafted on another network
    "early stop",  # the examples were crafted on another network, and only just fool that one
    "one target",  # the attack wanted one class, and another one may be nearer
    "part of AutoAttack",  # fewer attacks or queries than the standard ensemble has
]
Precision = Literal["float32", "bfloat16"]
Setting = Literal["white_box", "transfer"]
Versions = dict[Name, Name | None]  # of libraries; None: not installed

# One number, text or truth value of a defence or an attack that somebody else may have written.
Scalar = (
    None
    | bool
    | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    | Annotated[float, Meta(ge=-1e300, le=1e300)]
    | Annotated[str, Meta(max_length=1000)]
)
Option = Scalar | list[Scalar] | dict[Name, Scalar]


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a file. Unknown fields are refused; fields that have their default value are not written."""


class Document(Record, frozen=True, kw_only=True):
    """A whole file. `format` is the version of its layout; files that were written before it existed have version 1."""

    latest: ClassVar[int] = 1  # the newest version that this code can read
    longest: ClassVar[int] = LONGEST_TEXT  # bytes

    format: Annotated[int, Meta(ge=1, le=10**9)] = 1


class NewerFormat(ValueError):
    """A newer version of this code wrote the file, so its contents are not damaged."""


Schema = TypeVar("Schema", bound=Struct)


# ---- reading and writing ----


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for texts that json.loads accepts but that could surprise.

    Those are: a key that comes twice, of which two readers might take different ones; NaN and Infinity, which are not
    JSON; and more than DEEPEST levels of nesting.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        containers = [node.values() if isinstance(node, dict) else node for node in level if _is_container(node)]
        level = [child for container in containers for child in container]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def decode(text: str | bytes, schema: type[Schema]) -> Schema:
    """The Struct that a JSON text holds. Raises ValueError, with a short reason, if the text is not of this schema."""
    longest = getattr(schema, "longest", LONGEST_LINE)
    if len(text) > longest:
        raise ValueError(f"it is longer than {longest:,} bytes")
    value = parse_json(text if isinstance(text, str) else text.decode())
    fields, latest = schema.__struct_fields__, getattr(schema, "latest", 1)
    if "format" in fields:
        named = dict(zip(fields, value, strict=False)) if isinstance(value, list) else value  # a note is a list
        version = named.get("format", 1) if isinstance(named, dict) else 1
        if type(version) is int and version > latest:
            raise NewerFormat(
                f"it has format {str(version)[:20]}, newer than {latest}: a newer version of this code wrote it"
            )
    return _converted(value, schema)


def encode(document: Struct, indent: int | None = None) -> bytes:
    """A Struct as JSON. Raises ValueError if `decode` would refuse the result or read something else."""
    document = _converted(msgspec.to_builtins(document, enc_hook=_plain), type(document))  # tuples become lists, say
    value = msgspec.to_builtins(document)
    if isinstance(document, Document):
        value = {"format": document.format, **value}
    data = json.dumps(value, indent=indent, allow_nan=False).encode()
    if decode(data, type(document)) != document:
        raise ValueError(f"this {type(document).__name__} would not be read as it was written")
    return data


def _converted(value: Any, schema: type[Schema]) -> Schema:
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        place = place.strip("`.")
        raise ValueError(one_line(f"{place}: {message}" if place else message)) from None


def read_document(path: str | Path, schema: type[Schema], what: str) -> Schema:
    """The Struct in a JSON file. Raises UserError "PATH is not WHAT (reason)". what: "a report of a study", say."""
    try:
        return decode(read_bytes(path, getattr(schema, "longest", LONGEST_TEXT)), schema)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not {what} ({one_line(error)})") from error


def write_document(path: str | Path, document: Struct, indent: int | None = 1) -> None:
    """Write a JSON file atomically. Raises UserError, and changes nothing, if the schema refuses the document."""
    try:
        data = encode(document, indent)
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    write_atomically(path, data + b"\n")


def encode_lines(documents: list[Any]) -> bytes:
    """Structs as JSON, one on each line. Raises ValueError as `encode` does."""
    return b"".join(encode(document) + b"\n" for document in documents)


def decode_lines(data: bytes, first: type[Struct], others: type[Struct]) -> list[Any]:
    """The Structs in JSON lines: one of the schema `first`, then those of `others`. Raises ValueError.

    A line that is not JSON of its schema is found at once, before the slower reading that `decode` does.
    """
    if not data:
        raise ValueError("it is empty")
    quick = msgspec.json.Decoder(others)
    for line in data.splitlines()[1:]:
        try:
            quick.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ValueError(one_line(error)) from None
    return [decode(line, others if index else first) for index, line in enumerate(data.splitlines())]


def _plain(value: Any) -> Any:
    """A number or text of a class of its own, such as numpy.float64 or torch's version, as what JSON knows."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(f"{shown(value)} cannot be written as JSON")


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


# ---- trainings ----


class TrainingArguments(Recipe, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What was asked of a training: the fields of its Recipe, and what the recipe leaves open."""

    network: Name  # a key of networks.NETWORKS
    width: Width
    dataset: Name
    examples: Positive | None = None  # training images, adversarial ones included; the oldest logs lack it
    seed: Seed
    init_sha256: Sha256 | None = None  # of the checkpoint that the training started from; None: random weights
    # Somebody's own loss may be a plain function, which has a name only.
    defense: dict[Name, Option] | Name | None = None

    def __post_init__(self) -> None:
        if isinstance(self.defense, dict):
            _converted({key: self.defense.get(key) for key in ("name", "epsilon")}, _Defense)

    @property
    def defense_name(self) -> str | None:
        """The defence's name; None for plain training."""
        return self.defense["name"] if isinstance(self.defense, dict) else self.defense  # type: ignore[return-value]

    @property
    def defense_epsilon(self) -> float | None:
        """The radius that the defence trains for; None if it has none."""
        return self.defense_options.get("epsilon")  # type: ignore[return-value]

    @property
    def defense_options(self) -> dict[str, Option]:
        """The defence's options and its name."""
        return self.defense if isinstance(self.defense, dict) else {}


class _Defense(Struct):
    name: Name
    epsilon: Radius | None


class LogHeader(TrainingArguments, frozen=True, kw_only=True):
    """The first line of a training log: the arguments, and the machine that trained."""

    latest: ClassVar[int] = 1

    format: Annotated[int, Meta(ge=1, le=10**9)] = 1
    processes: Positive = 1
    threads: Positive
    versions: Versions


class Epoch(Record, frozen=True, kw_only=True):
    """Every further line of a training log."""

    epoch: Positive
    loss: Loss  # mean over the training images
    validation_accuracy: Fraction
    precision: Precision = "float32"
    seconds: Seconds  # of the training steps, without validation
    images_per_second: Annotated[int, Meta(ge=0, le=10**12)]
    # Of trainings with a defence that has a radius (utils.validation).
    robust_accuracy: Fraction | None = None
    choosing_accuracy: Fraction | None = None
    single_step_accuracy: Fraction | None = None


class RunState(Document, frozen=True, kw_only=True):
    """The header of an unfinished training's state."""

    longest: ClassVar[int] = LONGEST_LOG

    arguments: TrainingArguments
    processes: Positive = 1
    epochs: list[Epoch]


class NetworkArguments(Record, frozen=True, kw_only=True):
    """What a network's class needs to rebuild it."""

    width: Width
    num_classes: Annotated[int, Meta(ge=1, le=LARGEST_CLASSES)]
    activation: Literal["relu", "silu"] = "relu"


class CheckpointHeader(Document, frozen=True, kw_only=True):
    """The header of a checkpoint: how to rebuild the network, what its classes mean, how it was trained."""

    network: Name  # a key of networks.NETWORKS
    arguments: NetworkArguments
    dataset: Name
    class_names: Annotated[list[Name], Meta(max_length=LARGEST_CLASSES)]
    training: TrainingArguments | None = None  # None: unknown
    epochs: Positive | None = None  # the epoch that the weights come from
    precision: Precision = "float32"
    validation_accuracy: Fraction | None = None
    robust_accuracy: Fraction | None = None
    choosing_accuracy: Fraction | None = None
    single_step_accuracy: Fraction | None = None
    versions: Versions = {}

    def __post_init__(self) -> None:
        if len(self.class_names) != self.arguments.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.arguments.num_classes} classes")


# ---- adversarial sets and evaluations ----


class SetManifest(Document, frozen=True, kw_only=True):
    """The header of an adversarial set: what it was made from, how, and in how long."""

    attack: Literal["fgsm"]
    attack_version: Positive = 1  # see utils.evaluation.ATTACK_VERSIONS
    source_sha256: Sha256  # of the checkpoint whose gradient was taken
    dataset: Name
    split: Name
    split_sha256: Sha256
    batch_size: Positive
    versions: Versions
    sha256: Sha256  # of the contents
    seconds: Seconds


class Note(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A line of an evaluation's notes: one finished batch, as a list [key, hits, seconds, format]."""

    longest: ClassVar[int] = 2**24  # bytes, and so images in a batch

    key: Sha256  # of the evaluation
    hits: NotedHits
    seconds: Seconds
    format: Literal[1] = 1


class AttackRow(Record, frozen=True, kw_only=True):
    """What a report says of one attack on one network: the result, and every option of the attack."""

    name: Name  # a key of utils.evaluation.ATTACKS
    setting: Setting
    epsilon: Radius
    norm: Norm = "linf"
    first: Count = 0  # position in the split of the first image that is counted
    examples: Positive | None = None  # that are counted
    accuracy: Fraction  # the part of these that are classified as their labels
    confidence_interval: Interval
    seconds: TotalSeconds
    source: Text | None = None  # path of the checkpoint that crafted transferred examples
    version: Positive = 1  # of the attack: see utils.evaluation.ATTACK_VERSIONS
    warning: Text | None = None  # what makes the figure doubtful: the network is random, say (attacks.state)
    # The options; an attack has some of them.
    targeted: bool | None = None
    target: Name | None = None  # the class's number, "least-likely" or "random"; None: any wrong class
    steps: Positive | None = None
    step_size: Radius | None = None
    restarts: Positive | None = None
    random_start: bool | None = None
    momentum: Annotated[float, Meta(ge=0, le=2)] | None = None
    loss: Name | None = None
    early_stop: bool | None = None
    eot: Positive | None = None
    precision: Precision | None = None  # of the gradients
    seed: Seed | None = None
    attacks: list[Name] | None = None
    queries: Positive | None = None
    # Reports that were written before these existed lack them.
    # Without a target, of the images that are right without the attack, those that it makes wrong. With a target, of
    # the images that are counted, those that are classified as their target.
    success_rate: Fraction | None = None
    upper_bound: list[UpperBound] | None = None
    hits: Hits | None = None  # with --per-image


class MinimalEpsilons(Record, frozen=True, kw_only=True):
    """What a report says of attacks.minimal_epsilon: the distance of each image's nearest example that PGD found.

    All are upper bounds: a nearer example may exist. An image that is misclassified from the start has 0.
    """

    norm: Norm
    steps: Positive  # of PGD
    examples: Positive
    median: Radius | None  # the smallest at which half of the images have fallen; None: half of them never fall
    epsilons: list[Radius | None]  # of each image; None: no example was found


class Check(Record, frozen=True, kw_only=True):
    """What a report says of one check of the diagnosis. passed: None if the check could not be run."""

    name: Text
    passed: bool | None
    figures: Text


class DiagnosisReport(Record, frozen=True, kw_only=True):
    """What a report says of utils.diagnosis.diagnose."""

    epsilon: Radius
    source: Text | None  # path of the checkpoint that crafted transferred examples
    verdict: Text
    trustworthy: bool
    # What all attacks together leave. It is a robust accuracy only if the diagnosis is trustworthy.
    robust_accuracy: Fraction | None = None  # None: not trustworthy
    at_most: Fraction | None = None  # the same figure whatever the verdict; old reports lack it
    found_by: Text | None = None  # the last attack that lowered it by more than a hundredth; old reports lack it
    confidence_interval: Interval
    checks: list[Check]


class TestReport(Document, frozen=True, kw_only=True):
    """What test-*.py --json writes."""

    __test__: ClassVar[bool] = False  # pytest takes a class called Test... for tests
    longest: ClassVar[int] = 2**24  # bytes; the smallest radii take about 20 for each image

    checkpoint: Text
    sha256: Sha256 | None = None
    network: Name
    dataset: Name
    split: Name
    examples: Positive
    clean_accuracy: Fraction
    clean_confidence_interval: Interval
    clean_hits: Hits | None = None  # with --per-image
    classes: Positive | None = None  # that the network tells apart; None: 10
    attacks: list[AttackRow]
    diagnosis: DiagnosisReport | None = None
    minimal_epsilon: MinimalEpsilons | None = None


class SavedHeader(Document, frozen=True, kw_only=True):
    """The first line of images.jsonl in a folder of saved adversarial examples (utils.saving)."""

    attack: Name
    epsilon: Radius
    norm: Norm = "linf"
    batch_size: Positive  # of the predictions
    channels: Literal[1, 3]
    class_names: Annotated[list[Name], Meta(max_length=LARGEST_CLASSES)]
    clean_accuracy: Fraction  # on the saved originals
    accuracy: Fraction  # on the saved adversarial examples
    misclassified: Count  # examples that the network classified wrongly before they were rounded to 8 bits
    survived: Count  # of these, the ones that it still classifies wrongly


class SavedImage(Record, frozen=True, kw_only=True):
    """Every further line: an adversarial example and its original, which have the same file name."""

    file: Name
    label: Count
    before: Count  # the class that the network gives to the original
    after: Count  # the class that it gives to the saved example
    linf: Annotated[float, Meta(ge=0, le=1)]  # distance of the saved example from the original, in pixel units
    l2: Annotated[float, Meta(ge=0, le=1e6)]
    iterations: Positive | None = None  # that the attack was allowed for this image; None: unknown
