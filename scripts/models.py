"""Where a base model lies on this machine, as it is or quantised, and whether it is whole.

folder = recipe_folder(Path("/models"), recipe)   # /models/Qwen--Qwen3-Next-80B-A3B-Instruct, or that with .int8 behind
problem = recipe_problem(Path("/models"), recipe)                            # None, or a sentence
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recipes.catalog import load_catalog
from recipes.recipe import Quantize, Recipe
from recipes.staged import STAGED

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20  # 512 experts x 48 layers x 3 matrices name about 75,000 tensors: 8 MB
MAX_HEADER_BYTES = 100 * 10**6  # what the safetensors format itself allows


def model_folder(models: Path, model_id: str, quantize: Quantize | None = None) -> Path:
    """The folder of a base model: its id with `/` written `--`, and behind a dot how its weights are quantised."""
    name = model_id.replace("/", "--")
    return models / (f"{name}.{quantize}" if quantize else name)


def recipe_folder(models: Path, recipe: Recipe) -> Path:
    """The folder that a recipe trains on."""
    return model_folder(models, recipe.base.id, recipe.hardware.quantize)


def recipe_problem(models: Path, recipe: Recipe) -> str | None:
    """What is missing from that folder, as one sentence; None when it is whole."""
    folder, quantize = recipe_folder(models, recipe), recipe.hardware.quantize
    if quantize and not (folder / STAGED).is_file():
        how = f"`lorry stage {recipe.base.id} --quantize {quantize}`"
        return f"{folder}: no {quantize} weights of {recipe.base.id}; fill that models folder with {how}"
    return model_problem(folder)


def making_commands(models: Path, recipe: Recipe) -> list[list[str]]:
    """The commands that make the smoke model where the recipe wants it; they do nothing where it is complete.

    None for a model that must be staged.
    """
    facts, quantize = load_catalog().models.get(recipe.base.id), recipe.hardware.quantize
    if facts is None or facts.staged:
        return []
    plain = model_folder(models, recipe.base.id)
    commands = [[sys.executable, "-m", "trainer.smoke_model", "--out", str(plain)]]
    if quantize:
        words = quantising_words(plain, recipe_folder(models, recipe), recipe.base.id, quantize)
        commands.append([sys.executable, "-m", *words])
    return commands


def quantising_words(base: Path, to: Path, model_id: str, quantize: Quantize) -> list[str]:
    """What follows `python -m` to convert a base model's folder into a quantised one."""
    return ["trainer.quantize", "--base", str(base), "--to", str(to), "--kind", quantize, "--model", model_id]


def model_problem(folder: Path) -> str | None:
    """What is missing from a base model's folder, as one sentence; None when config, index and every shard are whole.

    A shard is whole when its length is what its safetensors header says: a copy that broke off is caught here, in
    milliseconds, and not after the machine has loaded for ten minutes.
    """
    if not folder.is_dir():
        return f"{folder}: there is no such folder; stage the base model there"
    if not (folder / CONFIG).is_file():
        return f"{folder}: it has no {CONFIG}; stage the base model again"
    try:
        shards = _shards(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"{folder / INDEX}: not an index of safetensors files ({error}); stage the base model again"
    broken = [f"{name} ({fault})" for name in shards if (fault := _fault(folder / name))]
    if broken:
        return f"{folder}: {len(broken)} of {len(shards)} weight files are not whole, first {broken[0]}; stage it again"
    return None


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{index.stat().st_size} bytes, more than {MAX_INDEX_BYTES}")
    value = json.loads(index.read_bytes())
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("no weight_map in it")
    names = sorted({str(name) for name in weight_map.values()})
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"it names {odd[0]!r}, which is not a .safetensors file of this folder")
    return names


def _fault(shard: Path) -> str | None:
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
                return "not a safetensors file"
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        wanted = 8 + header_bytes + max(ends, default=0)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "not a safetensors file"
    return None if size == wanted else f"{size} bytes instead of {wanted}"
