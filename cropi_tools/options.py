"""What a command can be asked: each option is described once, at the field of the record that holds its value.

A command has one frozen dataclass of options, in the room of its name (`gradients/options.py`). A field's annotation holds an
`Option`: names, words, group, range and how its text is read. `cli/entry.py` makes the command line and its help from these fields;
everything else reads the record. Ranges are checked when a record is made, whoever makes it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

from cropi_tools.data.dates import parse_date
from cropi_tools.runtime.errors import UsageError

GROUPS = (
    "Input and output",
    "Rollouts",
    "Sampling",
    "Verification",
    "Prompts",
    "Templates",
    "Scores",
    "Prediction",
    "Reliability",
    "Selection",
    "Objective",
    "Optimizer",
    "Adapters",
    "Gradients",
    "Sketch",
    "Evaluation",
    "Checkpoints",
    "Report",
    "Engine",
    "Device",
    "This run",
)
"""Headings of the options in every command's help, in this order."""

LARGEST = 1 << 40
"""Bound of whole numbers that have no other: beyond it is a slip of the keyboard, and some library's overflow."""


@dataclass(frozen=True)
class Range:
    """Which numbers an option takes. open_low, open_high: whether the bound itself is left out."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether the number lies within; never for NaN and infinity."""
        if not math.isfinite(value) if isinstance(value, float) else abs(value) > LARGEST:
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.high == math.inf:
            return f"above {low}" if self.open_low else f"{low} or more"
        if not self.open_low and not self.open_high:
            return f"{low} to {high}"
        return f"{'above' if self.open_low else 'at least'} {low}, {'below' if self.open_high else 'at most'} {high}"


def at_least(low: float) -> Range:
    """`low` and everything above."""
    return Range(low)


def above(low: float) -> Range:
    """Everything above `low`."""
    return Range(low, open_low=True)


def between(low: float, high: float) -> Range:
    """Both bounds and what lies between them."""
    return Range(low, high)


SHARE = Range(0.0, 1.0, open_low=True)
"""A share of something that is not nothing: above 0, at most 1."""
ANY_SEED = Range(-LARGEST, LARGEST)


@dataclass(frozen=True)
class Option:
    """One option, or, without a name that begins with a dash, the command's argument.

    group: one of GROUPS. metavar: what stands for the value in the help. range: of the number, or of each of several. read: what makes the
    value of its text where it is no plain text, number or choice; UsageError says what is wrong, without the option's name.
    shown: how the help writes the default, where it is not the value itself.
    """

    names: str
    help: str
    group: str = "Input and output"
    metavar: str | None = None
    range: Range | None = None
    read: Callable[[str], Any] | None = None
    shown: str | None = None

    @property
    def flag(self) -> str:
        """The name that messages use: the long one."""
        return max(self.names.split("/")[0].split(), key=len)

    @property
    def is_argument(self) -> bool:
        return not self.names.startswith("-")


_DESCRIBED: dict[type, Mapping[str, Option]] = {}


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command can be asked. Making a record checks it. UsageError: a value outside its range, or two that contradict each other."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of options, and what they are called now."""

    moved: ClassVar[Mapping[str, str]] = {}
    """Former options that are commands of their own now, and how these are called."""

    force: Annotated[
        bool,
        Option("--force", "Replace an output made by other options or inputs, after success.", "This run"),
    ] = False
    quiet: Annotated[bool, Option("--quiet", "No messages and no progress on stderr; errors remain.", "This run")] = (
        False
    )

    def __post_init__(self) -> None:
        for name, option in described(type(self)).items():
            if option.range is not None:
                _check_range(option, getattr(self, name))
        self.check()

    def check(self) -> None:
        """Raise UsageError where options contradict each other."""

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> Self:
        """The record of a command line. given: only what was written there, by field."""
        return cls(**given)


def refuse(mistakes: Iterable[tuple[object, str]]) -> None:
    """Raise UsageError with the remedy of the first mistake that was made. mistakes: whether each was, and its remedy."""
    for made, remedy in mistakes:
        if made:
            raise UsageError(remedy)


def described(record: type[CommandOptions]) -> Mapping[str, Option]:
    """The options of a command by field, in the order in which they are declared."""
    if record not in _DESCRIBED:
        hints = get_type_hints(record, include_extras=True)
        _DESCRIBED[record] = {field.name: hints[field.name].__metadata__[0] for field in fields(record)}
    return _DESCRIBED[record]


def types_of(record: type[CommandOptions]) -> Mapping[str, Any]:
    """The plain type of each field."""
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def default_of(field: Field[Any]) -> Any:
    """A field's default; MISSING where a value must be given."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _check_range(option: Option, value: Any) -> None:
    assert option.range is not None
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not option.range.holds(number):
            each = "numbers" if isinstance(value, tuple) else "a number"
            text = ",".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value}"
            raise UsageError(f"{option.flag} {text}: expected {each} in the range: {option.range}")


def pair(text: str) -> tuple[float, float]:
    """`A,B` as two numbers."""
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError("expected two numbers with a comma between them") from None
    return first, second


def pair_or_both(text: str) -> tuple[float, float]:
    """`A,B`, or one number for both."""
    return pair(text if "," in text else f"{text},{text}")


def ordered_pair(text: str) -> tuple[float, float]:
    """`LO,HI` with LO not above HI."""
    low, high = pair(text)
    if low > high:
        raise UsageError("the lower bound is above the upper")
    return low, high


def shard(text: str) -> tuple[int, int]:
    """`I/N` as two numbers, 1 <= I <= N."""
    index, slash, count = text.partition("/")
    if slash and len(text) < 30 and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise UsageError("expected I/N with 1 <= I <= N, such as 1/4")


def as_text(text: str) -> str:
    """A word of the command line that goes into data, as UTF-8 whatever the environment's encoding.

    File names are left as they are: so Python opens the file that was meant.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UsageError("is not UTF-8") from None


def setting(text: str) -> str:
    """`KEY=VALUE` as it is written."""
    if "=" not in text:
        raise UsageError("expected KEY=VALUE")
    return text


def check_file_name(name: str, flag: str) -> None:
    """Raise UsageError for a name that this environment cannot write as a file's: in the locale C only ASCII."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UsageError(
            f"{flag} {name}: file names are {sys.getfilesystemencoding()} in this environment, which has no such letters; "
            "set PYTHONUTF8=1, or give another name"
        ) from None


def named(text: str) -> tuple[str, str]:
    """`NAME=VALUE` as a pair."""
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise UsageError("expected NAME=VALUE")
    return as_text(name), value


# What several commands share, each with the same words everywhere.
POLICY = "POLICY"  # of every option that takes one; `data.hub.policy_folder` makes a folder of it
MODEL_HELP = "The policy: a Hugging Face folder, or a model of the hub, ORG/NAME[@REVISION], which is downloaded once."
Model = Annotated[str, Option("--model", MODEL_HELP, metavar=POLICY)]
Output = Annotated[str, Option("-o --output", "Where to write; `-` is stdout. .gz and .zst compress.", metavar="FILE")]
DryRun = Annotated[
    bool,
    Option("--dry-run", "Do a part of the work and say what all of it will take; write nothing.", "This run"),
]
EstimateAsJson = Annotated[bool, Option("--json", "With --dry-run: print the estimate as JSON on stdout.", "This run")]
AsJson = Annotated[bool, Option("--json", "Print the summary as JSON on stdout.", "Input and output")]
Seed = Annotated[int, Option("--seed", "Seed of everything random in this command.", "This run", "N", ANY_SEED)]
Limit = Annotated[int | None, Option("--limit", "Use only the first N records.", metavar="N", range=at_least(1))]
Shard = Annotated[
    tuple[int, int],
    Option("--shard", "Do only part I of N (from 1), for job arrays.", metavar="I/N", read=shard, shown="1/1"),
]
Device = Annotated[str, Option("--device", "cpu, cuda, cuda:1, or auto (cuda if there is one).", "Device", "DEVICE")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "auto"],
    Option("--dtype", "Number format; auto is float32 on a CPU, else as stored.", "Device"),
]
CheckpointActivations = Annotated[
    bool, Option("--checkpoint-activations", "Compute activations again in the backward pass: less memory.", "Device")
]
MaxTokens = Annotated[int, Option("--max-tokens", "Longest response, in tokens.", "Sampling", "N", at_least(1))]
Temperature = Annotated[
    float, Option("--temperature", "Sampling temperature; 0 is greedy.", "Sampling", range=at_least(0))
]
Date = Annotated[
    str,
    Option(
        "--date",
        "The date for chat templates that ask for one (Llama 3, Granite); never today's.",
        metavar="YYYY-MM-DD",
        read=parse_date,
    ),
]
AllowVerifier = Annotated[
    tuple[str, ...],
    Option(
        "--allow-verifier",
        "A Python file that records may name as their verifier; may be repeated. No other program that data names is run.",
        "Verification",
        "FILE.py",
    ),
]
VerifySeconds = Annotated[
    float,
    Option("--verify-seconds", "How long verifying one response may take.", "Verification", "SECONDS", at_least(0.1)),
]
PartialCredit = Annotated[
    bool,
    Option(
        "--partial-credit",
        "Reward partial scores of reasoning-gym as they are; without it a full score is 1, any other 0.",
        "Verification",
    ),
]
VERIFIERS = "maths, choice, exact, reasoning-gym, or FILE.py:FUNCTION, for all records"
Verifier = Annotated[
    str | None,
    Option("--verifier", f"{VERIFIERS}.", "Verification", "NAME", shown="each record's own, else maths"),
]
