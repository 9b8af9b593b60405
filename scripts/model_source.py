"""Where the files of a base model come from: a copy on this machine, or the Hugging Face hub.

folder, revision = find_copy(Path("~/.cache/huggingface/hub").expanduser(), "Qwen/Qwen3-8B", None)
names = files_to_stage(folder)           # safetensors, json, tokenizer and template files; never code, never pickles
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from recipes.catalog import load_catalog
from scripts.errors import InputError, NotFound, Problem, ProviderError
from scripts.model_manifest import MANIFEST
from scripts.models import CONFIG, INDEX, SINGLE, model_folder, model_problem

_WANTED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_REVISION = re.compile(r"[0-9a-f]{40}")
_MAX_CONFIG_BYTES = 2**20


def find_copy(folder: Path, model: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder with a model's files, and its revision where that is known.

    `folder` may be that folder, the model's folder in a Hugging Face cache, or the cache itself (its `hub` folder).
    Raises NotFound when none of these holds the model at this revision, InputError when its revision is not clear.
    """
    if (folder / CONFIG).is_file():
        known = folder.name if _REVISION.fullmatch(folder.name) else None
        if revision and known and revision != known:
            raise InputError(Problem(str(folder), f"it is revision {known}", f"--revision {known}, or another folder"))
        return folder, revision or known
    cached = folder if (folder / "snapshots").is_dir() else folder / f"models--{model.replace('/', '--')}"
    snapshots = sorted(p.name for p in (cached / "snapshots").glob("*") if _REVISION.fullmatch(p.name))
    if revision is None and len(snapshots) > 1:
        raise InputError(Problem(str(cached), f"it holds revisions {', '.join(snapshots)}", "name one with --revision"))
    if not snapshots or (revision and revision not in snapshots):
        held = f"no {CONFIG} and no snapshot of {model}" + (f" at {revision}" if revision else "")
        raise NotFound(Problem(str(folder), held, "a folder that holds the model's files, or a Hugging Face cache"))
    return cached / "snapshots" / (revision or snapshots[0]), revision or snapshots[0]


def files_to_stage(folder: Path) -> list[str]:
    """The names of the files that are staged: the weights that the index names, and what a tokenizer needs.

    Raises InputError when the weights are not whole safetensors files.
    """
    present = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if problem := model_problem(folder):
        pickles = [name for name in present if name.endswith(_PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in present):
            problem = f"{folder}: its weights are pickles ({pickles[0]}), which can run code; take .safetensors files"
        raise InputError(Problem("stage", problem))
    weights = {SINGLE}
    if (folder / INDEX).is_file():
        weights = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    others = {name for name in present if any(fnmatch(name, p) for p in _WANTED)}
    return sorted((others | weights) - {MANIFEST})


def require_right_model(folder: Path, model: str) -> None:
    """Raises InputError when config.json is not of the family that the catalog says."""
    path = folder / CONFIG
    wanted = load_catalog().family_of(model).model_type
    try:
        config: Any = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_CONFIG_BYTES else None
        types = [config["model_type"], (config.get("text_config") or {}).get("model_type")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(Problem(str(path), "not the configuration of a model", "the model's own files")) from None
    if wanted not in types:
        said = f"model_type is {str(types[0])[:60]!r}"
        raise InputError(Problem(str(path), said, f"the files of {model}, whose model_type is '{wanted}'"))


def download(model: str, revision: str | None, models: Path) -> tuple[Path, str]:
    """Fetches a model from the Hugging Face hub into its folder below `models`; what is there already is kept.

    Without a revision, the newest is looked up and pinned. Raises InputError where huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        want = "pip install huggingface_hub, or give a copy with --from"
        raise InputError(Problem("stage", "huggingface_hub is not installed", want)) from None
    folder = model_folder(models, model)
    try:
        pinned = revision or str(HfApi().model_info(model).sha)
        wanted, unwanted = ["*.safetensors", *_WANTED], ["*/*", "consolidated*"]
        snapshot_download(model, revision=pinned, local_dir=folder, allow_patterns=wanted, ignore_patterns=unwanted)
    except Exception as error:  # its network errors are those of whatever HTTP library it uses
        said = " ".join(str(error).split())[:200]
        want = "check the network, --revision and HF_TOKEN; run it again to go on, or give a copy with --from"
        raise ProviderError(Problem(f"Hugging Face: {model}", f"{type(error).__name__} ({said})", want)) from None
    return folder, pinned
