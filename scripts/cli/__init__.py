"""The command line: reads argv and the environment once, calls one verb, speaks its answer, returns its exit code.

lorry run smoke/zero3 --training-set examples/bicycle-care.jsonl
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from scripts.cli import (
    front_door,
    local_runpod,
    look_after_it,
    make_an_adapter,
    money,
    put_to_work,
    records,
    serve,
    set_up,
    the_rooms,
)
from scripts.cli.command import Command
from scripts.errors import InputError, LorryError, Problem
from scripts.settings import read_settings

GROUPS: dict[str, Sequence[Command]] = {
    "make an adapter": make_an_adapter.COMMANDS,
    "look after it": (*look_after_it.COMMANDS, *put_to_work.COMMANDS, *serve.COMMANDS, *records.COMMANDS),
    "the rooms": (*set_up.COMMANDS, *front_door.COMMANDS, *local_runpod.COMMANDS, *the_rooms.COMMANDS),
    "money": money.COMMANDS,
}
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done; 2 bad input; 3 refused; 4 not found; 5 conflict; 6 the training failed;
    7 something is not what it claims; 8 a provider failed; 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        if words and not words[0].startswith("-"):
            _require_known(words[0])
        arguments = _parser().parse_args(words or ["--help"])
        return int(arguments.run(arguments, read_settings(os.environ, Path.cwd())))
    except LorryError as error:
        print(json.dumps(error.as_json()) if as_json else error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; a job that was launched goes on: `lorry jobs` lists it", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(Problem(self.prog, message, f"see `{self.prog} --help`"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lorry",
        description="Carries a private training set to a rented GPU, fine-tunes an open-weight LLM with LoRA,\n"
        "and brings the adapter home.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lorry COMMAND ...",
    )
    commands = parser.add_subparsers(
        metavar="COMMAND", required=True, help=argparse.SUPPRESS, parser_class=_Parser, prog="lorry"
    )
    for command in (c for group in GROUPS.values() for c in group):
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _require_known(word: str) -> None:
    names = [c.name for group in GROUPS.values() for c in group]
    if word not in names:
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
        want = f"did you mean '{near[0]}'?" if near else "see `lorry --help`"
        raise InputError(Problem("command", f"there is no '{word}'", want))


def _overview() -> str:
    lines = []
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {command.name:<12} {command.help}" for command in commands]
        lines.append("")
    return "\n".join([*lines, "`lorry COMMAND --help` explains one."])
