"""Flags of other programs: taken over, said or refused in one line, before argparse sees them.

People arrive with the command lines of DLRM, of FAE and of Slipstream's original code. A script's
parser looks each flag that it does not have up in such a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple


class Foreign(NamedTuple):
    """A flag that is not ours.

    Attributes:
        name: with hyphens.
        text: why it is not needed, or what to use in its place.
        takes: how many values it has: 1, 0, or -1 for one that may be left out.
        refuses: it asks for what is not here; not so: it is noted, and left out.
        harmless: values that ask for nothing, which are left out without a word.
        becomes: its value -> our flags in its place; None: nothing takes its place.
    """

    name: str
    text: str
    takes: int = 1
    refuses: bool = False
    harmless: tuple[str, ...] = ()
    becomes: Callable[[str], Sequence[str]] | None = None


class Refused(ValueError):
    """A flag asks for what is not here."""


def by_name(*tables: Iterable[Foreign]) -> dict[str, Foreign]:
    """Tables as one; a flag of a later one replaces that of an earlier one."""
    return {flag.name: flag for table in tables for flag in table}


def translate(
    tokens: Sequence[str], known: Iterable[str], foreign: Mapping[str, Foreign]
) -> tuple[list[str], list[str]]:
    """A command line without foreign flags, and what is to be said of those that it had.

    `known` are our own flags, which are left alone. Raises `Refused` with the line that says why.
    """
    left = list(tokens)
    kept: list[str] = []
    notes: list[str] = []
    own = set(known)
    while left:
        token = left.pop(0)
        name, equals, value = token.partition("=")
        flag = None if name in own else foreign.get(name)
        if flag is None:
            kept.append(token)
            continue
        if not equals and flag.takes and left and not left[0].startswith("--"):
            value, equals = left.pop(0), "="
        if not equals and flag.takes > 0:
            raise Refused(f"{name}: expected a value")
        if equals and value in flag.harmless:
            continue
        if flag.refuses:
            raise Refused(f"{name}{equals}{value} is not here: {flag.text}")
        try:
            words = list(flag.becomes(value)) if flag.becomes is not None else []
        except ValueError:
            raise Refused(f"{name}: got {value!r}; expected a number") from None
        kept += words
        notes.append(f"{name}{equals}{value}: {' '.join(words) or flag.text}")
    return kept, notes
