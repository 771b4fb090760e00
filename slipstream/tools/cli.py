"""What every script's command line shares: parser, tables of flags, value types, error lines.

A chapter of the package describes the flags that configure it as a table of `Flag` rows, beside a
dataclass with a field for each; `add_flags` puts the table into a parser, and `values_of` takes the
parsed values out as that dataclass. Nothing below a script's `main` sees argparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from slipstream.tools import output
from slipstream.tools.foreign import Foreign, Refused, translate

Values = TypeVar("Values")
MAX_NUMBER = 1e300
TRACEBACK_VARIABLE = "SLIPSTREAM_TRACEBACK"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks and add each flag's default."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `--mini_batch_size` for `--mini-batch-size`, and no
    abbreviations.

    `foreign` are other programs' flags, see `slipstream.tools.foreign`.
    """

    def __init__(
        self, description: str | None, foreign: Mapping[str, Foreign] | None = None
    ) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self._foreign = foreign or {}

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains the flags)\n")

    def parse_known_args(self, args=None, namespace=None):  # noqa: D102 - argparse's own
        tokens = sys.argv[1:] if args is None else list(args)
        try:
            tokens, notes = translate(
                [_hyphenated(token) for token in tokens],
                self._option_string_actions,
                self._foreign,
            )
        except Refused as error:
            self.error(str(error))
        for note in notes:
            print(f"note: {note}")
        return super().parse_known_args(tokens, namespace)


def _hyphenated(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`; bad input becomes one line on stderr and exit status 2.

    `ValueError` and `OSError` are what our code raises for input it cannot use. Set
    SLIPSTREAM_TRACEBACK=1 to see where one came from. Output that cannot be written is lost, and
    does not change the exit status.
    """
    output.survive()
    try:
        main()
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not is_expected(error):
            raise
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: {said_of(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        output.say_lost()


def said_of(error: BaseException) -> str:
    """An error's text in one line; of one that has none, what it is."""
    usual = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    return " ".join(str(error).split()) or usual


def is_expected(error: BaseException) -> bool:
    """False for a defect of ours. PyTorch reports a failed allocation as a `RuntimeError`."""
    if isinstance(error, RuntimeError):
        return "allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, (ValueError, OSError, MemoryError))


def number(
    kind: type, low: float, high: float, low_open: bool = False
) -> Callable[[str], int | float]:
    """Make an argparse type: a finite number from `low` (excluded when `low_open`) to `high`."""
    interval = f"{'more than' if low_open else 'at least'} {low:g}"
    if high < math.inf:
        interval += f" and at most {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
            is_number = abs(value) < MAX_NUMBER  # False for NaN, infinity, and absurd integers
        except ValueError:
            is_number = False
        if not is_number or value < low or value > high or (low_open and value == low):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {noun}, {interval}")
        return value

    return parse


positive_int = number(int, 1, math.inf)
nonnegative_int = number(int, 0, math.inf)
positive_float = number(float, 0, math.inf, low_open=True)
nonnegative_float = number(float, 0, math.inf)
share = number(float, 0, 1)
positive_share = number(float, 0, 1, low_open=True)
percent = number(float, 0, 100)
positive_percent = number(float, 0, 100, low_open=True)


def boolean(text: str) -> bool:
    """Parse `true` or `false`: the ancestors' `--flag=False` meant True."""
    values = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected true or false")
    return values[text.lower()]


def steps(text: str) -> int:
    """Parse a number of mini-batches; DLRM's -1 is 0, never."""
    return max(0, int(number(int, -1, math.inf)(text)))


def byte_size(text: str) -> int:
    """Parse a number of bytes, with K, M, G or T for powers of 1024: `1500M`."""
    powers = {unit: 1024**power for power, unit in enumerate("KMGT", start=1)}
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in powers else (text, "")
    if not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected bytes, more than 0, as 2G")
    return int(number) * powers.get(unit, 1)


def every(text: str) -> tuple[int, float]:
    """Parse mini-batches, `1000`, or a time, `90s`, `30m`, `2h`: (steps, seconds), one is 0."""
    seconds = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in seconds else (text, "")
    try:
        value = float(number) if unit else int(number)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf or (unit and not value):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected mini-batches, as 1000, or a time, as 90s, 30m or 2h"
        )
    return (0, value * seconds[unit]) if unit else (int(value), 0.0)


def option(text: str) -> tuple[str, Any]:
    """Parse `name=value`: a JSON value (8, 0.5, true, [64, 32]), or else a text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected name=value, as width=64")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def check_options(
    parser: argparse.ArgumentParser, flag: str, options: list[tuple[str, Any]]
) -> None:
    """Refuse a flag's `option`s that name one twice, by `parser.error`."""
    names = [name for name, _ in options]
    if len(set(names)) < len(names):
        parser.error(f"{flag} names an option twice")


def layer_sizes(text: str) -> list[int]:
    """Parse layer or table sizes in DLRM's spelling, `13-512-256-64-16`."""
    try:
        sizes = [int(size) for size in text.split("-")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected sizes like 13-512-256-64-16")
    return sizes


class Flag(NamedTuple):
    """A flag of a command line.

    Attributes:
        name: with its hyphens; further spellings behind it, `--numpy-rand-seed --seed`. The value's
            name is the last one's.
        type: text -> value, or the texts to choose among.
        default: the value where it is not given.
        help: what it does, with its unit and what is "off".
        metavar: how the value is shown; not given: by its type or name.
        nargs: how many values, as argparse's.
    """

    name: str
    type: Callable[[str], Any] | tuple[str, ...]
    default: Any
    help: str
    metavar: str | None = None
    nargs: str | None = None

    @property
    def dest(self) -> str:
        """The name of its parsed value."""
        return self.name.split()[-1].removeprefix("--").replace("-", "_")

    @property
    def usual(self) -> Any:
        """Its parsed value where it is not given."""
        is_parsed = isinstance(self.default, str) and not isinstance(self.type, tuple)
        return self.type(self.default) if is_parsed else self.default  # type: ignore[operator]


def add_flag(container: argparse._ActionsContainer, flag: Flag) -> None:
    """Add one flag to a parser or a group of one."""
    names = flag.name.split()
    options: dict[str, Any] = {"dest": flag.dest}
    if isinstance(flag.type, tuple):
        options["choices"] = flag.type
    else:
        options["type"] = flag.type
    default, metavar = flag.default, flag.metavar
    if flag.type is boolean:
        default, metavar = str(default).lower(), "true|false"
        options |= {"nargs": "?", "const": True}
    if flag.nargs is not None:
        options["nargs"] = flag.nargs
    if default is REQUIRED:
        options["required"] = True
    container.add_argument(*names, default=default, help=flag.help, metavar=metavar, **options)


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """Add a table of flags to a parser, under a title of their own in its help."""
    group = parser.add_argument_group(title)
    for flag in flags:
        add_flag(group, flag)


def values_of(args: argparse.Namespace, kind: type[Values]) -> Values:
    """The parsed values that a dataclass has fields for, as one of that class."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names})


REQUIRED = argparse.SUPPRESS  # as a default: the flag must be given
SEED = Flag("--numpy-rand-seed --seed", nonnegative_int, 123, "seed of every random choice")
