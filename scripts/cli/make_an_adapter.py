"""Commands on the way from a training set to an adapter."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, get_args

from recipes.catalog import Catalog, load_catalog
from recipes.load import LoadedRecipe, load_recipe
from recipes.merged import Precision
from recipes.preparation import Plan, TrainingSetReport
from recipes.recipe import BackendName, Data
from scripts.cli.command import Command, actor, add_json, print_record
from scripts.errors import InputError, LorryError, Problem
from scripts.prepare_job import PreparedJob, check_set, prepare_job
from scripts.settings import Settings

if TYPE_CHECKING:
    from scripts.doctor import Finding
    from scripts.doctor.preflight import AwsBackend

_NOMINAL_JOB = "nominal-job"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=_set_path, metavar="FILE", help="conversations, in any supported form")
    parser.add_argument("--recipe", metavar="RECIPE", help="counts with its model's tokenizer and keeps its limits")
    parser.add_argument("--preview", action="store_true", help="show one example with the trained tokens marked")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep train.jsonl, valid.jsonl and report.json there")
    add_json(parser)


def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.check import check
    from scripts.tokenizer import find_tokenizer

    recipe = load_recipe(arguments.recipe).recipe if arguments.recipe else None
    tokenizer = find_tokenizer(recipe.base.id, settings.tokenizers) if recipe else None
    data, seed = (recipe.data, recipe.training.seed) if recipe else (Data(), 1)
    answer = check(
        arguments.file,
        data,
        seed,
        tokenizer,
        recipe=recipe,
        out=arguments.out,
        preview=arguments.preview,
        as_json=arguments.json,
        colour=sys.stdout.isatty(),
    )
    print(answer)
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--training-set", type=_set_path, metavar="FILE", help="without one, a nominal set is assumed")
    parser.add_argument("--explain", action="store_true", help="show the arithmetic, term by term")
    where = "choose there, as a launch would; AWS is also asked whether it would let such a job start"
    parser.add_argument("--backend", choices=get_args(BackendName), help=where)
    add_json(parser)


def _plan(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.plan import explain_text, plan_text

    catalog = load_catalog()
    loaded, report, plan = _planned(arguments, settings, catalog)
    asks_aws = arguments.backend in ("sagemaker", "ec2")
    findings = _preflight(arguments.backend, plan, catalog, settings) if asks_aws else None
    if arguments.json and findings is None:
        print_record(plan)
    elif arguments.json:
        asked = [dataclasses.asdict(finding) for finding in findings or ()]
        print(json.dumps(plan.model_dump(mode="json") | {"preflight": asked}, indent=2))
    else:
        print(plan_text(plan, catalog), end="")
        if arguments.explain:
            print("\n" + explain_text(plan, loaded, report, catalog), end="")
        if findings is not None:
            print("\n".join([f"\nBefore a launch on {arguments.backend}", *(f"  {finding}" for finding in findings)]))
    return 0


def _preflight(backend: AwsBackend, plan: Plan, catalog: Catalog, settings: Settings) -> list[Finding]:
    from scripts.doctor import Subject
    from scripts.doctor.preflight import preflight

    subject = Subject(now=datetime.now(UTC), store=settings.store, environment=os.environ)
    return preflight(backend, plan, catalog, subject)


def _render_arguments(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--backend", required=True, choices=get_args(BackendName))
    parser.add_argument("--training-set", type=_set_path, metavar="FILE", help="without one, a nominal set is assumed")
    add_json(parser)


def _render(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.backends import LAUNCHABLE, open_backend
    from scripts.render import render

    catalog = load_catalog()
    loaded, report, plan = _planned(arguments, settings, catalog)
    store = settings.store if arguments.backend == "local" or settings.store.startswith("s3://") else "s3://bucket/jobs"
    spec = render(
        loaded, plan, report, catalog, job_id=_NOMINAL_JOB, backend=arguments.backend, store=store, commit=_commit()
    )
    shown: dict[str, object] = {"launch.json": spec.model_dump(mode="json")}
    if arguments.backend in LAUNCHABLE:
        try:
            shown["request"] = open_backend(arguments.backend, os.environ).request(spec)
        except LorryError as error:  # a setting of the provider is missing; the spec is worth a look all the same
            shown["request"] = error.as_json()
    print(json.dumps(shown, indent=2))
    return 0


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--training-set", type=_set_path, required=True, metavar="FILE")
    parser.add_argument("--backend", choices=get_args(BackendName), help="default: where the plan is cheapest")
    parser.add_argument("--job", metavar="ID", help="name the job; launching the same job twice starts it once")
    parser.add_argument("--sdk", action="store_true", help="on SageMaker: ask through its own SDK (the `aws` extra)")
    add_json(parser)


def _launch(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.audit import record
    from scripts.backends import open_backend
    from scripts.launch import launch_by_hand
    from scripts.store import open_store

    with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
        job = _prepared(arguments, settings, Path(folder))
        _require_startable(job, _environment(arguments))
        backend = open_backend(job.spec.backend, _environment(arguments))
        store, now = open_store(settings.store), time.time()
        record(store, "launch", job.spec.job_id, who=actor(os.environ), now=now, note=_terms(job))
        submission = launch_by_hand(store, job.spec, job.plan, job.data, backend, now)
    if arguments.json:
        print_record(submission)
    else:
        if block := submission.handle.get("prepaid"):
            print(f"prepaid   in Capacity Block {block}")
        print(f"launched  {job.spec.job_id}\nfollow it with `lorry watch {job.spec.job_id}`")
    return 0


def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.audit import record
    from scripts.run import run
    from scripts.store import open_store

    with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
        job = _prepared(arguments, settings, Path(folder))
        _require_startable(job, _environment(arguments))
        store = open_store(settings.store)
        record(store, "launch", job.spec.job_id, who=actor(os.environ), now=time.time(), note=_terms(job))
        done = run(job, settings, _environment(arguments), _say, sys.stderr, now=time.time)
    if arguments.json:
        print_record(done.manifest)
    else:
        print(done.summary)
    return 0


def _require_startable(job: PreparedJob, environment: dict[str, str]) -> None:
    """Asks AWS whether it would let this job start, before anything is recorded or rented. Raises Refused."""
    from scripts.backends import open_backend
    from scripts.backends.suitable import suitable
    from scripts.doctor import Subject
    from scripts.doctor.preflight import preflight, require_passed

    spec, catalog = job.spec, load_catalog()
    if spec.backend not in ("sagemaker", "ec2"):
        return
    open_backend(spec.backend, environment).request(spec)  # settings that are wrong need no question
    others = [name for name, _ in suitable(spec, catalog)] if spec.backend == "ec2" else [spec.offer or ""]
    subject = Subject(now=datetime.now(UTC), store=spec.store, environment=environment)
    findings = preflight(spec.backend, job.plan, catalog, subject, others)
    for finding in findings:
        if finding.state == "not checked":
            _say("preflight", str(finding))
    require_passed(findings)


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """What a backend reads, with what the command line adds."""
    return {**os.environ} | ({"LORRY_SAGEMAKER_SDK": "yes"} if arguments.sdk else {})


def _terms(job: PreparedJob) -> str:
    return f"{job.spec.recipe_name} on {job.spec.offer}, at most ${job.spec.cap_usd:.2f}"


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", metavar="JOB_OR_DIR", help="a job id, a job folder, or an adapter's folder (no probe)")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model's own files")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder for the merged model")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16", help="of its weights: %(default)s")
    add_json(parser)


def _merge(arguments: argparse.Namespace, settings: Settings) -> int:
    from tqdm import tqdm

    from scripts.merge import merge
    from scripts.store import open_store

    with tqdm(unit="B", unit_scale=True, disable=None, file=sys.stderr, leave=False) as bar:
        store, to = open_store(settings.store), arguments.to
        merged = merge(arguments.which, store, arguments.base, to, arguments.precision, bar.update)
    if arguments.json:
        print_record(merged)
        return 0
    print(f"{to}: {merged.base_model} with the adapter of {merged.job_id}, in {merged.precision}")
    for row in merged.survival:
        print(f"  {row.group:<18} {row.share:>6.1%} of the change arrived, rounding error {row.relative_error:.1%}")
    said = "not compared with the training: the job's probe was not given"
    if merged.probe_error is not None:
        said = f"says what the trained model said: off by {merged.probe_error:.1e}, allowed {merged.probe_limit:.1e}"
    print(f"  {said}")
    return 0


def _planned(
    arguments: argparse.Namespace, settings: Settings, catalog: Catalog
) -> tuple[LoadedRecipe, TrainingSetReport | None, Plan]:
    """The recipe, the report on its training set where one is given, and the plan."""
    from scripts.plan import make_plan

    loaded = load_recipe(arguments.recipe, catalog)
    report = None
    if arguments.training_set:
        with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
            report = check_set(loaded, arguments.training_set, settings, Path(folder))
    return loaded, report, make_plan(loaded, report, catalog, arguments.backend)


def _prepared(arguments: argparse.Namespace, settings: Settings, folder: Path) -> PreparedJob:
    """What is to be launched. Without --job, the very same run that still waits for its machine is gone on with."""
    from scripts.launch import waiting_like
    from scripts.store import open_store

    job = prepare_job(
        arguments.recipe,
        arguments.training_set,
        backend=arguments.backend,
        settings=settings,
        folder=folder,
        job_id=arguments.job,
        now=time.time(),
        token=token_hex(2),
        commit=_commit(),
        say=_say,
    )
    waiting = None if arguments.job else waiting_like(open_store(settings.store), job.spec, time.time())
    if waiting is None:
        return job
    _say("launch", f"goes on with {waiting.job_id}, the same run, which waits for its machine; --job ID starts another")
    return dataclasses.replace(job, spec=waiting)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name such as smoke/zero3, or the path of a YAML file")


def _set_path(text: str) -> Path:
    """The type of every argument that names a training set: a file here, since it is checked before anything else.

    Raises InputError for a URL; a Path would turn s3://bucket/x into s3:/bucket/x.
    """
    if _URL.match(text):
        fetch = f"aws s3 cp {text} set.jsonl" if text.startswith("s3://") else f"curl --output set.jsonl {text}"
        want = f"`{fetch}`, then set.jsonl instead"
        if text.startswith("s3://"):
            want += "; where the bucket is another account's, its owner has to grant you s3:GetObject or send the file"
        raise InputError(Problem(f"training set {text[:200]}", "a URL, and a file of this machine is read", want))
    return Path(text)


def _say(stage: str, sentence: str) -> None:
    print(f"{stage:<9} {sentence}", file=sys.stderr, flush=True)


def _commit() -> str | None:
    """The commit of this code, for the manifest; None where it is not a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


COMMANDS = (
    Command("run", "check, plan, launch, watch, verify and store: all of it in one go", _launch_arguments, _run),
    Command("check", "read a training set and say what a model would learn from it", _check_arguments, _check),
    Command("plan", "say what fits where, how long it takes and what it costs", _plan_arguments, _plan),
    Command("render", "print what a launch would ask of a backend", _render_arguments, _render),
    Command("launch", "start a job and return", _launch_arguments, _launch),
    Command("merge", "merge an adapter into its base model, and say what that loses", _merge_arguments, _merge),
)
