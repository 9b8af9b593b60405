"""Commands that set the rooms up and check them: the environment is read here, and only here."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.cli.command import Command
from scripts.settings import Settings

if TYPE_CHECKING:
    from scripts.backends.runpod_api import RunpodApi


_TO = (
    "the models folder to fill: file:///folder or s3://bucket/prefix, on a Runpod volume s3://VOLUME-ID/models"
    " (default: the models folder of this machine)"
)
_FROM = (
    "a folder with the model's files, or a Hugging Face cache (default: what is staged on this machine, or a download)"
)


def _stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a base model of recipes/models.yaml, such as Qwen/Qwen3-8B")
    parser.add_argument("--to", metavar="URL", help=_TO)
    parser.add_argument("--from", dest="copy", type=Path, metavar="DIR", help=_FROM)
    parser.add_argument("--revision", metavar="SHA", type=_revision, help="commit of the model's repository")
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
            manifest = verify_model(store, arguments.model, bar.update)
        else:
            require_known_volume(store, runpod, os.environ)
            wanted = Staging(arguments.model, store, settings.models, arguments.copy, arguments.revision, runpod)
            manifest = stage(wanted, now=time.time(), progress=bar.update)
    if arguments.json:
        print(manifest.model_dump_json(indent=2))
    else:
        size = f"{len(manifest.files)} files, {manifest.total_bytes / 1e9:.1f} GB"
        state = "every byte is right" if arguments.verify else "staged"
        revision = f"revision {manifest.revision}" if manifest.revision else "of unknown revision"
        print(f"{store.url}/{folder_name(manifest.model)}: {state}: {manifest.model}, {revision}, {size}")
    return 0


def _revision(text: str) -> str:
    if len(text) != 40 or set(text) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"'{text[:60]}' is not a full commit: 40 characters 0-9a-f")
    return text


def _runpod() -> AbstractContextManager[RunpodApi | None]:
    """The account of RUNPOD_API_KEY, or None without a key."""
    key = os.environ.get("RUNPOD_API_KEY", "")
    if not key.strip():
        return nullcontext()
    from scripts.backends.runpod_api import BASE_URL, RunpodApi

    return RunpodApi(key, os.environ.get("RUNPOD_API_BASE_URL") or BASE_URL)


COMMANDS = (Command("stage", "put a base model on a volume, in a bucket or on a disk, once", _stage_arguments, _stage),)
