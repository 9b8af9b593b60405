"""Commands that set the rooms up and check them: the environment is read here, and only here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from recipes.recipe import Quantize
from scripts.cli.command import Command
from scripts.errors import LorryError, NotFound, Problem, ProviderError, VerificationFailed
from scripts.settings import Settings

if TYPE_CHECKING:
    from scripts.backends.runpod_api import RunpodApi
    from scripts.doctor import Finding


_ROOTS = "infra/live/prod/runpod, infra/live/prod/aws"
_TO = (
    "the models folder to fill: file:///folder or s3://bucket/prefix, on a Runpod volume s3://VOLUME-ID/models"
    " (default: the models folder of this machine)"
)
_FROM = (
    "a folder with the model's files, or a Hugging Face cache (default: what is staged on this machine, or a download)"
)
_QUANTIZE = "convert its weights first, for recipes with engine replica; needs torch on this machine"


def _stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a base model of recipes/models.yaml, such as Qwen/Qwen3-8B")
    parser.add_argument("--to", metavar="URL", help=_TO)
    parser.add_argument("--from", dest="copy", type=Path, metavar="DIR", help=_FROM)
    parser.add_argument("--revision", metavar="SHA", type=_revision, help="commit of the model's repository")
    parser.add_argument("--quantize", choices=get_args(Quantize), help=_QUANTIZE)
    parser.add_argument("--verify", action="store_true", help="read every staged byte again and change nothing")
    parser.add_argument("--json", action="store_true", help="print the manifest")


def _stage(arguments: argparse.Namespace, settings: Settings) -> int:
    from tqdm import tqdm

    from scripts.model_manifest import folder_name, staged_model, verify_model
    from scripts.stage import Staging, require_known_volume, stage
    from scripts.store import open_store

    staged_model(arguments.model)
    store = open_store(arguments.to or settings.models.resolve().as_uri())
    bar = tqdm(unit="B", unit_scale=True, disable=None, file=sys.stderr, leave=False)
    with bar, _runpod() as runpod:
        if arguments.verify:
            manifest = verify_model(store, arguments.model, bar.update, arguments.quantize)
        else:
            require_known_volume(store, runpod, os.environ)
            wanted = Staging(
                arguments.model,
                store,
                settings.models,
                arguments.copy,
                arguments.revision,
                runpod,
                arguments.quantize,
            )
            manifest = stage(wanted, now=time.time(), progress=bar.update)
    if arguments.json:
        print(manifest.model_dump_json(indent=2))
    else:
        size = f"{len(manifest.files)} files, {manifest.total_bytes / 1e9:.1f} GB"
        state = "every byte is right" if arguments.verify else "staged"
        revision = f"revision {manifest.revision}" if manifest.revision else "of unknown revision"
        where = f"{store.url}/{folder_name(manifest.model, manifest.quantize)}"
        print(f"{where}: {state}: {manifest.model}, {revision}, {size}")
    return 0


def _revision(text: str) -> str:
    if len(text) != 40 or set(text) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"'{text[:60]}' is not a full commit: 40 characters 0-9a-f")
    return text


def _env_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("roots", metavar="ROOT", nargs="+", type=Path, help="applied Terraform roots: " + _ROOTS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a new file instead of printing")
    parser.add_argument("--json", action="store_true", help="settings, and where each secret comes from, as JSON")


def _env(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.env import as_dotenv, web_settings, write_once

    web = web_settings(_rooms(arguments.roots), _inference(settings))
    text = json.dumps(dataclasses.asdict(web), indent=2) + "\n" if arguments.json else as_dotenv(web)
    if arguments.out is None:
        print(text, end="")
    else:
        write_once(arguments.out, text)
        yours = f"; set {', '.join(web.secrets)} yourself" if web.secrets else ""
        print(f"{arguments.out}: {len(web.settings)} settings{yours}")
    return 0


def _inference(settings: Settings) -> dict[str, str]:
    """What is live in this terminal's store; nothing, and a line, where the store cannot be read from here."""
    from scripts.serving.history import inference_settings
    from scripts.store import open_store

    try:
        return inference_settings(open_store(settings.store))
    except ProviderError as error:
        print(f"INFERENCE_MODEL is left out: {error}", file=sys.stderr)
        return {}


def _secrets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="secrets that are needed beyond those referred to")
    parser.add_argument("--check", action="store_true", help="only say which exist")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def _secrets(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.secrets import check_secrets, set_secrets

    with _required_runpod() as runpod:
        if arguments.check:
            found = check_secrets(runpod, arguments.names)
        else:
            found = set_secrets(runpod, os.environ.get, arguments.names)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(secret) for secret in found], indent=2))
    else:
        for secret in found:
            print(f"{secret.state:<8} {secret.name}" + (f"  for {', '.join(secret.used_by)}" if secret.used_by else ""))
        if not found:
            print("no template and no endpoint refers to a secret")
    if missing := [secret for secret in found if secret.state == "missing"]:
        want = "set the variable and run `lorry secrets`"
        raise NotFound(*(Problem(s.name, f"no such secret, and no value in {s.variable}", want) for s in missing))
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("roots", metavar="ROOT", nargs="*", type=Path, help="applied Terraform roots: " + _ROOTS)
    parser.add_argument("--model", help="the base model that jobs will need, such as Qwen/Qwen3-8B")
    parser.add_argument("--models", metavar="URL", help="the models folder to look into (default: this machine's)")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def _doctor(arguments: argparse.Namespace, settings: Settings) -> int:
    """Exit code 7 when a check failed; what could not be checked is no failure, but is said."""
    from scripts.doctor import Subject, examine, failure

    findings: list[Finding] = []
    rooms: dict[str, Any] = {}
    for root in arguments.roots:
        try:
            rooms |= _rooms([root])
        except LorryError as error:
            findings += failure(f"root {root}", error)
    with _runpod() as runpod:
        subject = Subject(
            now=datetime.now(UTC),
            rooms=rooms,
            runpod=runpod,
            model=arguments.model,
            models=arguments.models or settings.models.resolve().as_uri(),
            store=settings.store,
            environment=os.environ,
        )
        findings += examine(subject)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(str(finding) for finding in findings))
    return VerificationFailed.exit_code if any(finding.state == "failed" for finding in findings) else 0


def _rooms(roots: Sequence[Path]) -> dict[str, Any]:
    """What the roots say about themselves, in one mapping."""
    if not roots:
        return {}
    from scripts.terraform import read_outputs

    return {name: value for root in roots for name, value in read_outputs(root, os.environ).items()}


def _runpod() -> AbstractContextManager[RunpodApi | None]:
    """The account of RUNPOD_API_KEY, or None without a key."""
    return _required_runpod() if os.environ.get("RUNPOD_API_KEY", "").strip() else nullcontext()


def _required_runpod() -> RunpodApi:
    """The account of RUNPOD_API_KEY. Raises InputError without a key."""
    from scripts.backends.runpod_api import RunpodApi

    return RunpodApi.of(os.environ)


COMMANDS = (
    Command("stage", "put a base model on a volume, in a bucket or on a disk, once", _stage_arguments, _stage),
    Command("secrets", "create and check the secrets that Runpod keeps", _secrets_arguments, _secrets),
    Command("env", "write the web app's settings from the applied rooms", _env_arguments, _env),
    Command("doctor", "check a live set-up before money is spent", _doctor_arguments, _doctor),
)
