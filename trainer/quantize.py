"""Converts a base model once into a staged one: experts fused, large matrices quantised, layer by layer.

python -m trainer.quantize --base DIR --to DIR --kind nf4 --model Qwen/Qwen3-Next-80B-A3B-Instruct [--revision SHA]

Of kind bf16 nothing is quantised; a base in MXFP4 is decoded.
Memory holds one matrix of the base and one quantised stack. Killed, it goes on behind the last whole file. Standard
output gets a JSON line per file: {"done": bytes, "total": bytes}.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.catalog import Family, load_catalog
from recipes.job import Record, read_record, write_record
from recipes.staged import STAGED, Kind, StagedFile, StagedModel
from trainer.base_files import MXFP4, BaseFiles, file_sha256
from trainer.experts.quantised import GROUP, SCALE_GROUP
from trainer.failures import TrainingStopped, exit_code
from trainer.shards import ShardWriter
from trainer.staged import STORAGES, empty_model, quantised_layers

SPARE_BYTES = 10**9
"Left free beyond the model, for whatever else writes there."
INDEX = "model.safetensors.index.json"
UNFINISHED = "unfinished.json"
LOCK = ".writer.lock"
_SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_OWN_FILES = (STAGED, UNFINISHED, INDEX, "manifest.json")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Unfinished(Record):
    """unfinished.json: the files that are whole, of a conversion that is under way."""

    base_sha256: str
    kind: Kind
    files: dict[str, StagedFile]


@dataclass(frozen=True)
class Piece:
    """One weight of the model: as the files hold it, or in a storage whose (meta) tensors are `tensors`."""

    name: str
    tensors: dict[str, Tensor]
    weights: int
    stacked: bool
    "A fused expert stack."
    storage: bool


def quantise(
    base: Path, to: Path, kind: Kind, *, model: str, revision: str | None, say: Callable[[int, int], None]
) -> StagedModel:
    """Writes the staged folder `to` and returns its record; what is there and sound is kept.

    Raises TrainingStopped: bad_base_model for a base that is quantised already or of unknown family, disk_full before
    the first byte when the rest would not fit.
    """
    files = BaseFiles(base)
    sha256 = files.sha256()
    shards = _shards(files, kind)
    to.mkdir(parents=True, exist_ok=True)
    finished = read_record(StagedModel, to / STAGED)
    done = _found(finished, to, sha256, kind)
    whole = {n: f for n, f in done.files.items() if (to / n).is_file() and file_sha256(to / n) == f.sha256}
    sizes = {name: sum(t.nbytes for piece in pieces for t in piece.tensors.values()) for name, pieces in shards.items()}
    require_room(to, sum(size for name, size in sizes.items() if name not in whole))
    for name, pieces in shards.items():
        if name not in whole:
            whole[name] = _write_shard(files, to / name, pieces, kind)
            write_record(to / UNFINISHED, done.model_copy(update={"files": whole}))
        say(sum(sizes[n] for n in shards if n in whole and n <= name), sum(sizes.values()))
    copy_side_files(base, to)
    _forget_quantisation(to / "config.json")
    _write_index(to, shards)
    record = StagedModel(
        model=model,
        revision=finished.revision if finished else revision,
        base_sha256=sha256,
        kind=kind,
        inputs_per_scale=GROUP,
        scales_per_step=SCALE_GROUP,
        files={name: whole[name] for name in shards},
        parameters=_counts(shards, kind),
    )
    write_record(to / STAGED, record)
    (to / UNFINISHED).unlink(missing_ok=True)
    return record


def family_of(config: Any) -> Family:
    """The catalog's family of a configuration. Raises TrainingStopped for one it does not know."""
    kind = config.model_type.removesuffix("_text")
    for family in load_catalog().families.values():
        if family.model_type == kind:
            return family
    raise TrainingStopped("bad_base_model", f"model_type is '{config.model_type}', of no family in recipes/models.yaml")


def _found(finished: StagedModel | None, to: Path, sha256: str, kind: Kind) -> Unfinished:
    """What earlier conversions wrote there: of a finished one every file, so that damage is repaired."""
    begun = read_record(Unfinished, to / UNFINISHED)
    if finished is not None:
        if (finished.base_sha256, finished.kind) != (sha256, kind):
            raise TrainingStopped(
                "bad_base_model", f"{to} holds {finished.kind} of another base; name another folder, or remove that one"
            )
        return Unfinished(base_sha256=sha256, kind=kind, files=finished.files)
    if begun is not None and (begun.base_sha256, begun.kind) == (sha256, kind):
        return begun
    return Unfinished(base_sha256=sha256, kind=kind, files={})


def _shards(files: BaseFiles, kind: Kind) -> dict[str, list[Piece]]:
    """What goes into which file: one for what is before the layers, one per layer, one for the rest."""
    model = empty_model(files.folder, torch.bfloat16)
    family = family_of(model.config)
    if files.quantised_by and (files.quantised_by, kind) != (MXFP4, "bf16"):
        raise TrainingStopped(
            "bad_base_model", f"{files.folder}: it is quantised already; give the bf16 checkpoint of the model"
        )
    if kind != "bf16" and family.moe_block and not family.our_experts:
        raise TrainingStopped("bad_base_model", f"the experts of {family.model_type} cannot be quantised; say bf16")
    stacks, linears = quantised_layers(model, family)
    groups: dict[tuple[int, int], list[Piece]] = {}
    layers_seen = False
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        layers_seen = layers_seen or layer is not None
        key = (1, int(layer[1])) if layer else (2 if layers_seen else 0, 0)
        groups.setdefault(key, []).append(_piece(files, name, parameter, kind, stacks, linears))
    numbered = enumerate(sorted(groups), start=1)
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": groups[key] for number, key in numbered}


def _piece(files: BaseFiles, name: str, like: Any, kind: Kind, stacks: list[str], linears: list[str]) -> Piece:
    dtype = files.dtype(name)
    if dtype not in _FLOATS:
        raise TrainingStopped("bad_base_model", f"{files.folder}: {name} is {dtype}; give the bf16 checkpoint")
    layer, stacked = name.removesuffix(".weight"), name in stacks
    if kind == "bf16" or not (stacked or layer in linears):
        kept = {name: torch.empty(like.shape, dtype=dtype, device="meta")}
        return Piece(name, kept, like.numel(), stacked, storage=False)
    shape = tuple(like.shape) if stacked else (1, *like.shape)
    place = name if stacked else f"{layer}.storage"
    layout = STORAGES[kind].empty(shape, device="meta").tensors()
    return Piece(name, {f"{place}.{part}": t for part, t in layout.items()}, like.numel(), stacked, storage=True)


def _write_shard(files: BaseFiles, path: Path, pieces: list[Piece], kind: Kind) -> StagedFile:
    layout = {name: tensor for piece in pieces for name, tensor in piece.tensors.items()}
    try:
        with ShardWriter(path, layout) as shard:
            for piece in pieces:
                if piece.storage:
                    count = next(iter(piece.tensors.values())).shape[0]
                    made = STORAGES[kind].quantise(_matrices(files, piece), count).tensors()
                    for name, tensor in zip(piece.tensors, made.values(), strict=True):
                        shard.put(name, [tensor])
                else:
                    shard.put(piece.name, _matrices(files, piece))
    except ValueError as error:
        raise TrainingStopped("bad_base_model", f"{files.folder} does not fit its config.json: {error}") from None
    return shard.described


def _matrices(files: BaseFiles, piece: Piece) -> Iterator[Tensor]:
    device = "cuda" if piece.storage and torch.cuda.is_available() else "cpu"
    matrices = files.matrices(piece.name) if piece.stacked else iter([files.tensor(piece.name)])
    return (matrix.to(device) for matrix in matrices)


def require_room(to: Path, needed: int) -> None:
    """Raises TrainingStopped (disk_full) when so many bytes would not leave SPARE_BYTES free."""
    free = shutil.disk_usage(to).free
    if needed and needed + SPARE_BYTES > free:
        raise TrainingStopped(
            "disk_full",
            f"{to}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed and {SPARE_BYTES / 1e9:.0f} GB kept "
            "free; make the disk larger, or remove what is not needed",
        )


def copy_side_files(base: Path, to: Path) -> None:
    """Configuration, tokenizer and templates; each appears whole or not at all."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name not in _OWN_FILES and any(fnmatch(path.name, p) for p in _SIDE_FILES):
            temporary = to / f".{path.name}.tmp"
            shutil.copyfile(path, temporary)
            os.replace(temporary, to / path.name)


def _forget_quantisation(path: Path) -> None:
    """The weights beside this configuration are not quantised by their publisher any more."""
    config = json.loads(path.read_bytes())
    if config.pop("quantization_config", None):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _write_index(to: Path, shards: dict[str, list[Piece]]) -> None:
    where = {name: shard for shard, pieces in shards.items() for piece in pieces for name in piece.tensors}
    temporary = to / f".{INDEX}.tmp"
    temporary.write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, to / INDEX)


def _counts(shards: dict[str, list[Piece]], kind: Kind) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for piece in (p for pieces in shards.values() for p in pieces):
        dtype = str(next(iter(piece.tensors.values())).dtype).removeprefix("torch.")
        counts[kind if piece.storage else dtype] += piece.weights
    return dict(sorted(counts.items()))


def main() -> int:
    """Exit code 0, or recipes.causes.EXIT_CODES of the cause, with a sentence on standard error."""
    parser = argparse.ArgumentParser(description="Converts a base model into a staged one.")
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--kind", choices=("int8", "nf4", "bf16"), required=True)
    parser.add_argument("--model", required=True, help="its id in recipes/models.yaml")
    parser.add_argument("--revision", help="commit of the model's repository")
    a = parser.parse_args()

    def work() -> None:
        with alone(a.to):
            quantise(a.base, a.to, a.kind, model=a.model, revision=a.revision, say=say)

    return exit_code(work)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No second process fills the folder: one that lost its command may still be at work. Raises TrainingStopped."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sentence = f"{folder}: another process is filling it; let it end"
            raise TrainingStopped("cannot_run_here", sentence) from None
        yield


def say(done: int, total: int) -> None:
    """The progress line of a long verb."""
    print(json.dumps({"done": done, "total": total}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
