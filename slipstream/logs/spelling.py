"""How a log spells dates, decimal numbers and labels, where a column file says it.

Such fields are put into the usual spelling before they are looked at: ISO times, a decimal point, 1
and 0. `parsing` does so by columns; here it is done in plain Python, where a bad line is looked
for. Directives are strptime's; none of them is lax about spaces, signs or other digits than 0 to 9,
as polars' own parser is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

DECIMAL_KINDS = ("count", "number", "weight")
SPELLED_KINDS = ("label", *DECIMAL_KINDS, "day", "order")
EXAMPLE = '"%d.%m.%Y", or "%m/%d/%Y %I:%M %p"'
MAX_FORMAT = 100  # characters
MONTHS = (
    "January February March April May June July August September October November December".split()
)
FIRST_OF_1900 = 69  # two digits of a year from it on are 1969 and later, as strptime has it


def _in_any_case(words: Iterable[str]) -> str:
    return "|".join("".join(f"[{c.upper()}{c.lower()}]" for c in word) for word in words)


# What a directive stands for, and its texts: without its `?` between digits, where it has two.
DIRECTIVES = {
    "Y": ("year", "[0-9]{4}"),
    "y": ("year", "[0-9]{2}"),
    "m": ("month", "0?[1-9]|1[0-2]"),
    "b": ("month", _in_any_case(month[:3] for month in MONTHS)),
    "B": ("month", _in_any_case(MONTHS)),
    "d": ("day", "0?[1-9]|[12][0-9]|3[01]"),
    "H": ("hour", "[01]?[0-9]|2[0-3]"),
    "I": ("hour", "0?[1-9]|1[0-2]"),
    "p": ("half of the day", "[AaPp][Mm]"),
    "M": ("minute", "[0-5]?[0-9]"),
    "S": ("second", "[0-5]?[0-9]"),
    "f": ("fraction of a second", "[0-9]{1,9}"),
    "z": ("offset", "Z|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9]"),
}
OF_DIGITS = "YymdHIMSf"


@lru_cache
def pattern_of(date_format: str) -> str:
    """The regular expression, Python's and polars', of a date format's texts.

    Its groups are named as the directives. Raises `ValueError` for what is no format of a date.
    """
    try:
        if len(date_format) > MAX_FORMAT:
            raise ValueError(f"expected at most {MAX_FORMAT} characters")
        date_format.encode()
        # Pairs of a directive and nothing, or of nothing and a character.
        tokens = re.findall("(?s)%([^%]|$)|%?(.)", date_format.replace("%.f", ".%f"))
        _check_directives([directive for directive, character in tokens if not character])
    except ValueError as error:
        raise ValueError(f"format is {date_format[:MAX_FORMAT]!r}: {error}") from None
    is_digit = [d in OF_DIGITS if d else character.isdigit() for d, character in tokens]
    patterns = []
    for at, (directive, character) in enumerate(tokens):
        if character:
            patterns.append(re.escape(character))
            continue
        pattern = DIRECTIVES[directive][1]
        if is_digit[at] and any(is_digit[max(at - 1, 0) : at] + is_digit[at + 1 : at + 2]):
            pattern = pattern.replace("?", "")  # of "%Y%m%d" 2024123 is none
        patterns.append(f"(?P<{directive}>{pattern})")
    return "".join(patterns)


def _check_directives(directives: list[str]) -> None:
    known = " ".join(f"%{name}" for name in DIRECTIVES)
    for directive in directives:
        if directive not in DIRECTIVES:
            raise ValueError(f"%{directive} is none of {known} (and %% for %)")
    parts = [DIRECTIVES[directive][0] for directive in directives]
    for part, usual in (("year", "%Y"), ("month", "%m"), ("day", "%d")):
        if part not in parts:
            raise ValueError(f"it has no {part} ({usual}); expected one as {EXAMPLE}")
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise ValueError(f"it has the {twice[0]} twice")
    if ("I" in directives) != ("p" in directives):
        raise ValueError("%I, 1 to 12, and %p, AM or PM, need each other; %H is 0 to 23")


@dataclass(frozen=True)
class Spelling:
    """How a column's fields are written. Raises `ValueError` for what none can be.

    Attributes:
        format: of dates, in strptime's directives; empty: ISO.
        decimal: of numbers, `.` or `,`.
        positive, negative: the texts of labels, exact; none: 0 and 1.
    """

    format: str = ""
    decimal: str = "."
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.format, str):
            raise ValueError(f"format is {self.format!r}; expected a text, as {EXAMPLE}")
        if self.format:
            pattern_of(self.format)
        if self.decimal not in (".", ","):
            raise ValueError(f'decimal is {self.decimal!r}; expected "." or ","')
        if (self.positive, self.negative) != ((), ()):
            _check_words("positive", self.positive)
            _check_words("negative", self.negative)
            if both := set(self.positive) & set(self.negative):
                raise ValueError(f"{min(both)!r} is both positive and negative")

    def usual(self, field: bytes) -> bytes | None:
        """A field in the usual spelling, of a time its date alone; None: it is not in its own."""
        if self.positive:
            words = [word.encode() for word in self.positive]
            is_known = field in words or field in [word.encode() for word in self.negative]
            return b"%d" % (field in words) if is_known else None
        if self.decimal == ",":
            return None if b"." in field else field.replace(b",", b".")
        return _date_of(field, self.format) if self.format else field


USUAL = Spelling()


def _check_words(key: str, words: tuple[str, ...]) -> None:
    is_tuple = isinstance(words, tuple) and words != ()
    if not is_tuple or not all(isinstance(word, str) and word for word in words):
        given = repr(list(words) if is_tuple else words) if words else "missing"
        raise ValueError(
            f'{key} is {given}; expected texts, as ["yes", "Y"] (quoted, in YAML too): positive '
            "and negative are both needed, so that a typo does not become a negative label"
        )


def _date_of(field: bytes, date_format: str) -> bytes | None:
    try:
        found = re.fullmatch(pattern_of(date_format), field.decode())
    except UnicodeDecodeError:
        return None
    if not found:
        return None
    parts = found.groupdict()
    year = parts.get("Y") or f"{19 + (int(parts['y']) < FIRST_OF_1900)}{parts['y']}"
    name = (parts.get("b") or parts.get("B") or "")[:3].title()
    month = parts.get("m") or [month[:3] for month in MONTHS].index(name) + 1
    return f"{year}-{month:0>2}-{parts['d']:0>2}".encode()
