"""Brings a staged base model from a bucket to a machine's own disk: every file of its manifest, whole or not at all.

fetch_model("s3://bucket/models", Path("/scratch/models"), recipe)        # what is there already is kept
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipes.catalog import load_catalog
from recipes.recipe import Recipe
from scripts.errors import NotFound, Problem
from scripts.model_manifest import MANIFEST, folder_name, read_manifest
from scripts.models import recipe_folder
from scripts.store import open_store

AT_ONCE = 8
"Files at a time: one connection to S3 carries about 0.1 GB/s, the disk takes more."


def fetch_model(url: str, models: Path, recipe: Recipe) -> None:
    """Fills the recipe's folder below `models`; the manifest comes last. Nothing to do without a URL,
    or for a model that is made on the spot.

    Raises NotFound when the model is not staged there, VerificationFailed when a file is not what the manifest says.
    """
    base, quantize = recipe.base.id, recipe.hardware.quantize
    facts = load_catalog().models.get(base)
    if not url or facts is None or not facts.staged:
        return
    source = open_store(url)
    manifest = read_manifest(source, base, quantize)
    if manifest is None:
        how = f"`lorry stage {base} --to {source.url}`" + (f" with --quantize {quantize}" if quantize else "")
        raise NotFound(Problem(f"{source.url}/{folder_name(base, quantize)}", "it is not staged there", how))
    folder = recipe_folder(models, recipe)

    def fetch(name: str) -> None:
        file, path = manifest.files[name], folder / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            path.parent.mkdir(parents=True, exist_ok=True)
            source.get_file(f"{folder.name}/{name}", path, sha256=file.sha256)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, manifest.files))
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
