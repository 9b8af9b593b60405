"""Commands that put a finished adapter to work: evaluate it first."""

from __future__ import annotations

import argparse
import os
import time

from scripts.cli.command import Command, add_json, print_record
from scripts.errors import Refused
from scripts.settings import Settings


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job with a finished adapter")
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="an OpenAI-compatible endpoint that compares answers; held-out questions go there",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the model to ask there; its key is in LORRY_JUDGE_KEY")
    add_json(parser)


def _evaluate(arguments: argparse.Namespace, settings: Settings) -> int:
    """Exit code 3 when the adapter did not pass."""
    from scripts.evaluate import evaluate, summary
    from scripts.job_folder import read_job
    from scripts.job_report import write_report
    from scripts.judge import required_judge
    from scripts.state import job_state
    from scripts.store import open_store

    key = os.environ.get("LORRY_JUDGE_KEY", "")
    judge = required_judge(arguments.judge, arguments.judge_model, key) if arguments.judge else None
    store = open_store(settings.store)
    assessment = evaluate(store, arguments.job, settings.models, os.environ, now=time.time(), judge=judge)
    state = job_state(read_job(store, arguments.job), None, time.time())
    report = write_report(store, arguments.job, state)
    if arguments.json:
        print_record(assessment)
    else:
        print(f"{arguments.job}: " + ("passed, it may go live" if assessment.passed else "not passed"))
        for name, text in summary(assessment):
            print(f"{name:<14} {text}")
        print(f"{'report':<14} {report.removeprefix('file://')}")
    return 0 if assessment.passed else Refused.exit_code


COMMANDS = (Command("evaluate", "compare an adapter with its base: may it go live?", _evaluate_arguments, _evaluate),)
