"""What every command of the command line is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
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


def print_record(record: Record) -> None:
    """A job file on standard output, as it is written on disk."""
    print(record.model_dump_json(indent=2))
