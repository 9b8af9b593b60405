"""One line of the arithmetic: what it is called, what it comes to, and how, in words and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Term:
    """A part of a sum: bytes of memory, or seconds."""

    name: str
    size: float
    says: str
    "The formula with its numbers, for `lorry plan --explain`."


def present(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The terms that come to something."""
    return tuple(term for term in terms if term.size)


def in_gib(terms: Iterable[Term]) -> dict[str, float]:
    """GiB by name."""
    return {term.name: term.size / GIB for term in terms}


def number(value: float) -> str:
    """A count as a person reads it: 79.67 billion, 43.6 million, 4,096, 0.516."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.4g} billion" if size >= 1e9 else f"{value / 1e6:.4g} million"
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.4g}"
