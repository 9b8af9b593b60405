"""Commands that look after jobs and adapters."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from scripts.backends import LAUNCHABLE, open_backend
from scripts.backends.base import Backend, KeepsLogs, Observation
from scripts.cli.command import Command, actor, add_json, print_record
from scripts.errors import NotFound, Problem, ProviderError, TrainingFailed
from scripts.job_folder import JobFiles, job_ids, read_job, read_jobs
from scripts.settings import Settings
from scripts.state import JobState, job_state
from scripts.store import Store, open_store


def _job_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job id; `lorry jobs` lists them")
    add_json(parser)


def _job_and_logs_arguments(parser: argparse.ArgumentParser) -> None:
    _job_argument(parser)
    parser.add_argument("--logs", action="store_true", help="also what its machine prints, as the provider keeps it")


def _watch(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.watch import watch

    store = open_store(settings.store)
    state = watch(store, arguments.job, _backend(_known(store, arguments.job)), sys.stderr, logs=arguments.logs)
    _print_state(arguments, arguments.job, state)
    if state.state != "completed":
        raise TrainingFailed(Problem(f"job {arguments.job}", f"{state.state}: {state.sentence}"))
    return 0


def _stop_arguments(parser: argparse.ArgumentParser) -> None:
    _job_argument(parser)
    parser.add_argument("--reason", default="asked for at a terminal", help="recorded with the job")


def _stop(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.stop import stop_job

    store, now = open_store(settings.store), time.time()
    files = _known(store, arguments.job)
    stop = stop_job(store, arguments.job, _backend(files), "user", arguments.reason, now, actor(os.environ))
    if arguments.json:
        print(json.dumps({"job": arguments.job, "stop": stop.model_dump() if stop else None}))
    elif stop is None:
        print(f"{arguments.job} had ended already; nothing was changed")
    else:
        print(
            f"{arguments.job} is asked to stop; it saves a checkpoint first. `lorry watch {arguments.job}` follows it"
        )
    return 0


def _jobs(arguments: argparse.Namespace, settings: Settings) -> int:
    store, now = open_store(settings.store), time.time()
    files = read_jobs(store, job_ids(store))
    states = [(f, state_of(f, now)) for f in files]
    if arguments.json:
        print(json.dumps([{"job": f.job_id, **asdict(s)} for f, s in states], indent=2))
    elif not states:
        print(f"no jobs in {store.url}")
    else:
        for f, s in states:
            spent = "" if s.spent_usd is None else f"${s.spent_usd:.2f}"
            print(f"{f.job_id:<52} {s.state:<10} {s.progress:>3}%  {spent:>8}  {s.sentence}")
    return 0


def _show(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.job_report import write_report

    store = open_store(settings.store)
    files = _known(store, arguments.job)
    state = state_of(files, time.time())
    if arguments.json:
        records = {
            k: v.model_dump(mode="json") if v else None for k, v in vars(files).items() if hasattr(v, "model_dump")
        }
        print(json.dumps({"job": arguments.job, "state": asdict(state), **records}, indent=2))
        return 0
    _print_state(arguments, arguments.job, state)
    for name, value in _facts(files):
        print(f"{name:<14} {value}")
    print(f"{'report':<14} {write_report(store, arguments.job, state).removeprefix('file://')}")
    backend, handle = _backend(files), files.submission.handle if files.submission else None
    if arguments.logs and handle and isinstance(backend, KeepsLogs):
        for line in backend.logs(handle):
            print(line)
    return 0


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an adapter folder with its manifest.json")
    parser.add_argument("job", metavar="JOB", help="the job id under which it is stored")
    parser.add_argument("--to", metavar="URL", help="file:///folder or s3://bucket/prefix (default: LORRY_STORE)")
    add_json(parser)


def _push(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.push import push

    store = open_store(arguments.to or settings.store)
    manifest = push(arguments.folder, store, arguments.job)
    if arguments.json:
        print_record(manifest)
    else:
        print(f"stored {len(manifest.files)} files under {store.url}/{arguments.job}/adapter")
    return 0


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--from", dest="source", metavar="URL", help="where the job is (default: LORRY_STORE)")
    add_json(parser)


def _pull(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.pull import pull

    manifest = pull(open_store(arguments.source or settings.store), arguments.job, arguments.folder)
    if arguments.json:
        print_record(manifest)
    else:
        print(f"fetched and verified {len(manifest.files)} files into {arguments.folder}")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an adapter folder with its manifest.json")
    parser.add_argument("--base", metavar="MODEL", help="the base model you are going to load it on")
    add_json(parser)


def _verify(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.adapter import verify_adapter

    manifest = verify_adapter(arguments.folder, base_model=arguments.base)
    if arguments.json:
        print_record(manifest)
    else:
        print(f"verified: {len(manifest.files)} files of job {manifest.job_id}, for base model {manifest.base_model}")
    return 0


def _known(store: Store, job_id: str) -> JobFiles:
    files = read_job(store, job_id)
    if files.launch is None:
        raise NotFound(Problem(f"job {job_id}", f"no such job in {store.url}", "see what there is with `lorry jobs`"))
    return files


def _backend(files: JobFiles) -> Backend:
    assert files.launch is not None
    return open_backend(files.launch.backend, os.environ)


def state_of(files: JobFiles, now: float) -> JobState:
    """The state with the provider's word where it can be asked; without it from the files alone."""
    observation: Observation | None = None
    if files.launch and files.launch.backend in LAUNCHABLE and files.submission and files.submission.handle:
        try:
            observation = _backend(files).observe(files.submission.handle)
        except ProviderError:
            observation = None
    return job_state(files, observation, now)


def _print_state(arguments: argparse.Namespace, job_id: str, state: JobState) -> None:
    print(
        json.dumps({"job": job_id, **asdict(state)}) if arguments.json else f"{job_id}: {state.state}, {state.sentence}"
    )


def _facts(files: JobFiles) -> list[tuple[str, str]]:
    spec, status, result = files.launch, files.status, files.result
    assert spec is not None
    facts = [("recipe", f"{spec.recipe_name} on {spec.recipe.base.id}"), ("machine", f"{spec.offer} ({spec.backend})")]
    if status:
        loss = "" if status.training_loss is None else f", loss {status.training_loss:.4f}"
        facts.append(("step", f"{status.step} of {status.total_steps}{loss}"))
    if result and result.initial_validation_loss is not None and result.final_validation_loss is not None:
        before, after = result.initial_validation_loss, result.final_validation_loss
        facts.append(("held-out loss", f"{before:.4f} before, {after:.4f} after"))
    if files.manifest:
        facts.append(("adapter", f"{len(files.manifest.files)} files, proved and stored"))
    return facts + [("damaged", sentence) for sentence in files.broken]


COMMANDS = (
    Command("watch", "follow a job until it ends", _job_and_logs_arguments, _watch),
    Command("stop", "end a job and its machine", _stop_arguments, _stop),
    Command("jobs", "list the jobs and how they stand", add_json, _jobs),
    Command("show", "say what is known of one job, and draw its report", _job_and_logs_arguments, _show),
    Command("push", "put an adapter into a store", _push_arguments, _push),
    Command("pull", "fetch an adapter, verified", _pull_arguments, _pull),
    Command("verify", "check that an adapter is what its manifest says", _verify_arguments, _verify),
)
