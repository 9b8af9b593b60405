"""What an adapter folder must be: its manifest is written last, from what the trainer proved, and verified by anyone.

manifest = verify_adapter(Path("bicycle-care-1/adapter"))      # raises VerificationFailed with every fault found
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.job import LaunchSpec, Manifest, Proof, Result, write_record
from scripts.errors import NotFound, Problem, VerificationFailed
from scripts.store.base import sha256_of
from scripts.store.disk import disk_errors

MANIFEST = "manifest.json"
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")

_PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"A pickle of protocol 2 to 5, or the zip archive that torch.save wraps around one."
_HEADER_BYTES = 100_000_000  # the library's own limit
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


def write_manifest(
    job: Path,
    spec: LaunchSpec,
    result: Result,
    proof: Proof,
    *,
    cost_usd: float | None,
    now: float,
    image: str | None = None,
) -> Manifest:
    """Writes job/adapter/manifest.json when the trainer finished, the proof passed and the bytes are the proved ones.

    A manifest that stands there already and says the same stays as it is. `now` is seconds since 1970. image: the one
    that trained it, where a machine was rented for it.
    Raises VerificationFailed with every reason why there is no adapter to vouch for.
    """
    folder = job / "adapter"
    problems = _unproved(job, spec, result, proof)
    problems += _faults(folder, result.adapter_sha256, "result.json", "train again")
    if problems:
        raise VerificationFailed(*problems)
    manifest = Manifest(
        job_id=spec.job_id,
        created_at=now,
        files=dict(sorted(result.adapter_sha256.items())),
        base_model=spec.recipe.base.id,
        base_revision=result.base_revision,
        base_sha256=result.base_sha256,
        recipe_name=spec.recipe_name,
        recipe_sha256=spec.recipe_sha256,
        training_set_sha256=spec.source_sha256,
        train_sha256=spec.train_sha256,
        valid_sha256=spec.valid_sha256,
        versions=result.versions,
        commit=spec.commit,
        image=image,
        initial_validation_loss=result.initial_validation_loss,
        final_validation_loss=result.final_validation_loss,
        effect=proof.effect,
        reproduction_error=proof.reproduction_error,
        trainable_parameters=result.trainable_parameters,
        wall_seconds=result.wall_seconds,
        cost_usd=cost_usd,
    )
    earlier = _manifest_of(folder) if (folder / MANIFEST).exists() else None
    if earlier is not None and same_adapter(earlier, manifest):
        return earlier
    write_record(folder / MANIFEST, manifest)
    return manifest


def verify_adapter(folder: Path, *, base_sha256: str | None = None, base_model: str | None = None) -> Manifest:
    """The manifest of a whole adapter folder, optionally of one base model.

    Raises NotFound when there is no manifest, VerificationFailed with every fault found: a changed, missing or extra
    file, another base model, a tensor file with empty or overlapping tensors, a pickle.
    """
    manifest = _manifest_of(folder)
    problems = _faults(folder, manifest.files, MANIFEST, "pull the adapter again")
    where = str(folder / MANIFEST)
    if base_model is not None and manifest.base_model != base_model:
        problems.append(
            Problem(where, f"an adapter of {manifest.base_model}", f"use it on that model, not {base_model}")
        )
    if base_sha256 is not None and manifest.base_sha256 != base_sha256:
        got = f"an adapter of the base model with hash {_short(manifest.base_sha256)}, not {_short(base_sha256)}"
        problems.append(Problem(where, got, f"stage {_named(manifest)}"))
    if problems:
        raise VerificationFailed(*problems)
    return manifest


def read_manifest(data: bytes | None, where: str) -> Manifest | None:
    """The manifest in these bytes, None for none. Raises VerificationFailed when they are something else."""
    try:
        return None if data is None else Manifest.model_validate_json(data)
    except ValidationError as error:
        got = f"not a manifest ({str(error).splitlines()[0]})"
        raise VerificationFailed(Problem(where, got, "the file as Lorry wrote it; pull the adapter again")) from None


def same_adapter(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests vouch for the same thing; when it was written, how long it took and cost may differ."""
    apart = {"created_at", "wall_seconds", "cost_usd"}
    return one.model_dump(exclude=apart) == other.model_dump(exclude=apart)


def file_names(folder: Path) -> list[str]:
    """Everything below an adapter folder except its manifest, as relative names, sorted."""
    paths = [Path(where, name) for where, _, names in os.walk(folder) for name in names]
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in paths) if name != MANIFEST)


def _unproved(job: Path, spec: LaunchSpec, result: Result, proof: Proof) -> list[Problem]:
    """What keeps result.json and proof.json from vouching for the adapter of this job."""
    problems = []
    for name, record in (("result.json", result), ("proof.json", proof)):
        if record.job_id != spec.job_id:
            problems.append(Problem(str(job / name), f"of job {record.job_id}", f"the file of job {spec.job_id}"))
    if result.outcome != "completed" or result.exit_code != 0:
        got = f"outcome {result.outcome} with exit code {result.exit_code}"
        problems.append(Problem(str(job / "result.json"), got, "only a completed run has an adapter"))
    if not proof.passed:
        problems.append(
            Problem(str(job / "proof.json"), f"not passed ({proof.sentence})", "only a proved adapter counts")
        )
    if result.adapter_sha256 != proof.adapter_sha256:
        names = sorted(dict(result.adapter_sha256.items() ^ proof.adapter_sha256.items()))
        got = f"proved other bytes than result.json names ({', '.join(names)})"
        problems.append(Problem(str(job / "proof.json"), got, "prove the adapter again"))
    return problems


def _faults(folder: Path, expected: dict[str, str], source: str, cure: str) -> list[Problem]:
    """Every way in which the folder differs from `expected` (SHA-256 by file name), which `source` states."""
    problems = []
    found = set(file_names(folder))
    for name in sorted({*REQUIRED, *expected} - found):
        problems.append(Problem(str(folder / name), "missing", cure))
    for name in sorted(found - set(expected)):
        problems.append(Problem(str(folder / name), f"not named in {source}", "remove it, or " + cure))
    for name in sorted(set(REQUIRED) - set(expected)):
        problems.append(Problem(str(folder / source), f"does not name {name}", cure))
    for name in sorted(found):
        problems += _file_faults(folder / name, expected.get(name), source, cure)
    return problems


def _file_faults(path: Path, expected: str | None, source: str, cure: str) -> list[Problem]:
    if path.is_symlink() or not path.is_file():
        return [Problem(str(path), "not a plain file", "copy the file itself here")]
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() in _PICKLE_SUFFIXES or start.startswith(_PICKLE_STARTS):
        return [Problem(str(path), "a pickle, which can run code when it is loaded", "keep safetensors only")]
    got = sha256_of(path)
    if expected is not None and got != expected:
        return [Problem(str(path), f"SHA-256 {_short(got)}, but {source} says {_short(expected)}", cure)]
    return _tensor_problems(path) if path.suffix == ".safetensors" else []


def _tensor_problems(path: Path) -> list[Problem]:
    """Why a safetensors file cannot be a set of non-empty tensors that fill it exactly; empty when it can be.

    The file is 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, then the
    data; source: the format section of the safetensors README, read 2026-11. Values are not read: the trainer proved
    them, and the hash says that they are the same.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            return [_tensor_problem(path, f"{size} bytes with a header of {length}")]
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return [_tensor_problem(path, "a header that is not plain JSON")]
    if not isinstance(header, dict):
        return [_tensor_problem(path, "a header that is not a mapping of tensors")]
    header.pop("__metadata__", None)
    if not header:
        return [_tensor_problem(path, "no tensors")]
    wrong = [(name, _fault(entry)) for name, entry in header.items()]
    problems = [_tensor_problem(path, f"tensor {name[:120]} {fault}") for name, fault in wrong if fault]
    return problems or _layout_problems(path, header, size - 8 - length)


def _fault(entry: Any) -> str:
    """What is wrong with one tensor's entry; empty when nothing is."""
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in _BITS:
        return "has no known dtype"
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return "has no proper shape and offsets"
    if math.prod(shape) == 0:
        return f"is empty (shape {shape})"
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[entry["dtype"]]:
        return f"has {offsets[1] - offsets[0]} bytes for {entry['dtype']} {shape}"
    return ""


def _layout_problems(path: Path, header: dict[str, Any], data_bytes: int) -> list[Problem]:
    """Tensors must follow each other without gap or overlap and end with the file."""
    end = 0
    for name, (begin, next_end) in sorted(
        ((name, entry["data_offsets"]) for name, entry in header.items()), key=lambda item: item[1]
    ):
        if begin != end:
            return [_tensor_problem(path, f"tensor {name[:120]} begins at byte {begin}, not {end}")]
        end = next_end
    return (
        [] if end == data_bytes else [_tensor_problem(path, f"{data_bytes} bytes of data for {end} bytes of tensors")]
    )


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _tensor_problem(path: Path, got: str) -> Problem:
    return Problem(str(path), got, "a safetensors file as the trainer wrote it")


def _manifest_of(folder: Path) -> Manifest:
    path = folder / MANIFEST
    with disk_errors(path):
        manifest = read_manifest(path.read_bytes() if path.is_file() else None, str(path))
    if manifest is None:
        raise NotFound(Problem(str(path), "no such file", "without it there is no adapter; see `lorry show`"))
    return manifest


def _named(manifest: Manifest) -> str:
    return manifest.base_model + (f" at revision {manifest.base_revision[:12]}" if manifest.base_revision else "")


def _short(sha256: str) -> str:
    return f"{sha256[:12]}..."
