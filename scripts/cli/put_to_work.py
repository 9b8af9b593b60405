"""Commands that put a finished adapter to work: evaluate it, take it out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from scripts.cli.command import Command, actor, add_json, print_record
from scripts.errors import InputError, Problem, Refused
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
    from scripts.audit import record
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
    verdict = "passed" if assessment.passed else "not passed"
    record(store, "evaluate", arguments.job, who=actor(os.environ), now=time.time(), note=verdict)
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


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job; for peft, vllm and merged with a finished adapter")
    forms = "peft (as trained), vllm (a matrix per expert), merged; its recipe: axolotl, llamafactory, skypilot"
    parser.add_argument("--for", dest="form", metavar="FORM", required=True, help=forms)
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="a new folder")
    parser.add_argument("--max-lora-rank", type=int, default=None, metavar="N", help="of the vLLM server it goes to")
    add_json(parser)


def _export(arguments: argparse.Namespace, settings: Settings) -> int:
    """An adapter for vLLM is also loaded dry; exit code 3 when a part of it would not act there."""
    from scripts.audit import record
    from scripts.dry_load import RANKS, Server, dry_load, tensor_shapes
    from scripts.export import FORMS, export
    from scripts.store import open_store

    if arguments.form not in FORMS:
        raise InputError(Problem("--for", arguments.form, f"one of {', '.join(FORMS)}"))
    store = open_store(settings.store)
    names = export(store, arguments.job, arguments.form, arguments.to, os.environ)
    record(store, "export", arguments.job, who=actor(os.environ), now=time.time(), note=arguments.form)
    problems: list[Problem] = []
    if arguments.form == "vllm":
        config = json.loads((arguments.to / "adapter_config.json").read_text())
        rank = arguments.max_lora_rank or next((n for n in RANKS if n >= config["r"]), config["r"])
        problems = dry_load(arguments.to, config["base_model_name_or_path"], Server(max_lora_rank=rank))
    if arguments.json:
        found = [vars(problem) for problem in problems]
        print(json.dumps({"job": arguments.job, "for": arguments.form, "files": names, "problems": found}, indent=2))
    else:
        print(f"{arguments.to}: {', '.join(names)}")
        if arguments.form == "vllm" and not problems:
            count = len(tensor_shapes(arguments.to / "adapter_model.safetensors"))
            print(f"vLLM 0.33 would use all {count} tensors, with --max-lora-rank {rank} or more")
        for problem in problems:
            print(problem, file=sys.stderr)
    return Refused.exit_code if problems else 0


COMMANDS = (
    Command("evaluate", "compare an adapter with its base: may it go live?", _evaluate_arguments, _evaluate),
    Command("export", "take an adapter or its recipe out, in another program's form", _export_arguments, _export),
)
