"""One colour a method in every figure of the benchmarks.

Okabe and Ito's, told apart by colour-blind readers; what is no method takes `COLOURS` in order.
"""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
METHOD_COLOURS = {
    "plain": "#767676",
    "baseline": "#000000",
    "fae": "#0072B2",
    "slipstream": "#D55E00",
    "random": "#009E73",
    "uniform": "#CC79A7",
    "cold": "#56B4E9",
}
# What is no method, beside methods: no colour of theirs.
OTHER_COLOURS = ("#39424E", "#7B4BB7", "#8F8A00", "#A0522D")
ALSO = {"stale": "slipstream", "none": "fae"}  # a policy that makes it that method


def method_of_label(label: str) -> str | None:
    """The method that a figure's label begins with, as `slipstream-random d30`; None: of no method
    that has a colour.
    """
    name = label.replace(",", " ").split(" ")[0]
    method, _, policy = name.partition("-")
    if method == "slipstream" and policy:
        method = ALSO.get(policy, policy)
    return method if method in METHOD_COLOURS else None


def colours_of(labels: Sequence[str]) -> list[str]:
    """A colour a label: its method's, where each label is of another method; else in order."""
    methods = [method_of_label(label) for label in labels]
    if len(set(methods)) == len(methods):
        rest = iter(COLOURS[3:5] * len(labels))
        return [METHOD_COLOURS[m] if m else next(rest) for m in methods]
    return [COLOURS[number % len(COLOURS)] for number in range(len(labels))]
