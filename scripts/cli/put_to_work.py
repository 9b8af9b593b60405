"""Commands that put a finished adapter to work: evaluate it, take it out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.cli.command import Command, actor, add_json, print_record
from scripts.errors import InputError, NotFound, Problem, Refused
from scripts.settings import Settings

if TYPE_CHECKING:
    from scripts.store import Store


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
    forms = "peft (as trained), vllm (a matrix per expert), shared (one for all), merged; its recipe: "
    forms += "axolotl, llamafactory, skypilot"
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
    if arguments.form == "merged":
        return _merged(arguments, settings, store)
    names = export(store, arguments.job, arguments.form, arguments.to, os.environ)
    record(store, "export", arguments.job, who=actor(os.environ), now=time.time(), note=arguments.form)
    problems: list[Problem] = []
    if arguments.form in ("vllm", "shared"):
        config = json.loads((arguments.to / "adapter_config.json").read_text())
        rank = arguments.max_lora_rank or next((n for n in RANKS if n >= config["r"]), config["r"])
        problems = dry_load(
            arguments.to,
            config["base_model_name_or_path"],
            Server(max_lora_rank=rank, shared_experts=arguments.form == "shared"),
        )
    if arguments.json:
        found = [vars(problem) for problem in problems]
        print(json.dumps({"job": arguments.job, "for": arguments.form, "files": names, "problems": found}, indent=2))
    else:
        print(f"{arguments.to}: {', '.join(names)}")
        if arguments.form in ("vllm", "shared") and not problems:
            count = len(tensor_shapes(arguments.to / "adapter_model.safetensors"))
            flags = f"--max-lora-rank {rank}" + (" --enable-moe-shared-loras" if arguments.form == "shared" else "")
            print(f"vLLM 0.33 would use all {count} tensors, with {flags}")
        for problem in problems:
            print(problem, file=sys.stderr)
    return Refused.exit_code if problems else 0


def _merged(arguments: argparse.Namespace, settings: Settings, store: Store) -> int:
    """`lorry merge` into the base model of this machine: the merged model must say what the trained one said."""
    from scripts.audit import record
    from scripts.job_folder import read_job
    from scripts.merge import merge
    from scripts.models import model_folder, model_problem

    spec = read_job(store, arguments.job).launch
    if spec is None:
        raise NotFound(Problem(f"job {arguments.job}", f"no such job in {store.url}", "see `lorry jobs`"))
    base = model_folder(settings.models, spec.recipe.base.id)
    if problem := model_problem(base):
        want = f"`lorry merge {arguments.job} --base DIR --to {arguments.to}`, with the base model's own files"
        raise Refused(Problem("--for merged", problem, want))
    merged = merge(arguments.job, store, base, arguments.to, "bf16")
    record(store, "export", arguments.job, who=actor(os.environ), now=time.time(), note="merged, bf16")
    if arguments.json:
        print_record(merged)
    else:
        print(f"{arguments.to}: {merged.base_model} with the adapter in it, in bf16; quantise it where it is served")
        if merged.probe_error is not None:
            far, allowed = merged.probe_error, merged.probe_limit
            print(f"it says what the trained model said: off by {far:.1e}, allowed {allowed:.1e}")
    return 0


COMMANDS = (
    Command("evaluate", "compare an adapter with its base: may it go live?", _evaluate_arguments, _evaluate),
    Command("export", "take an adapter or its recipe out, in another program's form", _export_arguments, _export),
)
