"""What every command of the command line is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from recipes.job import Record
from scripts.settings import Settings


@dataclass(frozen=True)
class Command:
    """One command: its arguments, and what it does with them. `run` returns the exit code."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Settings], int]


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag that every command has."""
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def actor(environment: Mapping[str, str]) -> str:
    """Who is at this terminal, for the audit: LORRY_ACTOR where it is set, else the name of the login."""
    names = (environment.get(name, "") for name in ("LORRY_ACTOR", "LOGNAME", "USER", "USERNAME"))
    return next(filter(None, names), "unknown")


def print_record(record: Record) -> None:
    """A job file on standard output, as it is written on disk."""
    print(record.model_dump_json(indent=2))
