"""The environment, read once by a mouth and handed on as a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import InputError, Problem


@dataclass(frozen=True)
class Settings:
    """store: URL of the folder that holds the job folders. models: folder of base models on this machine."""

    store: str
    models: Path
    tokenizers: tuple[Path, ...]
    "Folders searched for tokenizer files: the models folder, then the Hugging Face cache."


def read_settings(environment: Mapping[str, str], folder: Path) -> Settings:
    """Settings from LORRY_STORE (default: jobs/ in `folder`), LORRY_MODELS, HF_HOME and HOME."""
    home = Path(environment.get("HOME", "/nonexistent"))
    store = environment.get("LORRY_STORE") or (folder / "jobs").resolve().as_uri()
    if not store.startswith(("file:///", "s3://")):
        raise InputError(Problem("LORRY_STORE", repr(store), "a URL: file:///folder or s3://bucket/prefix"))
    models = Path(environment.get("LORRY_MODELS") or home / ".cache" / "lorry" / "models")
    hub = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface") / "hub"
    return Settings(store.rstrip("/"), models, (models, hub))
