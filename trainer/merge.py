"""Merges an adapter into its base model, file by file: W + s B A in fp32, rounded once.

python -m trainer.merge --job DIR --base DIR --to DIR [--precision bf16]     # or --adapter DIR: no probe, no proof

Tensors of multi-token prediction (mtp.*), which transformers drops, keep their bytes. The folder appears whole: until
then it is `.NAME.merging`, and a merge that was killed goes on there behind the last whole file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from recipes.catalog import Family, load_catalog
from recipes.job import LaunchSpec, Manifest, Record, Result, read_record, write_record
from recipes.merged import MERGED, MergedModel, Precision
from recipes.staged import STAGED, StagedFile
from trainer import probe
from trainer.base_files import BaseFiles, file_sha256, loading, name_in_model, refuse_incomplete
from trainer.deltas import Deltas
from trainer.export import WEIGHTS
from trainer.failures import TrainingStopped, exit_code
from trainer.quantize import INDEX, LOCK, UNFINISHED, alone, copy_side_files, require_room, say
from trainer.shards import Header, ShardWriter
from trainer.survival import Sums, added, group_of, survival

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Source:
    """What is merged, and what is known of its training."""

    adapter: Path
    job_id: str
    base_model: str
    base_revision: str | None
    base_sha256: str
    sha256: dict[str, str]
    "Per file of the adapter."
    spec: LaunchSpec | None
    probe: Path | None


class Unfinished(Record):
    """unfinished.json: the files that are whole, of a merge that is under way, and what each contributes."""

    base_sha256: str
    adapter_sha256: str
    precision: Precision
    files: dict[str, StagedFile]
    sums: dict[str, dict[str, Sums]]


def merge(
    source: Source, base: Path, to: Path, precision: Precision, progress: Callable[[int, int], None]
) -> MergedModel:
    """Writes `to` and returns its record; a finished merge of the same is returned as it is.

    Raises TrainingStopped: bad_base_model for another base than the adapter's, bad_targets for an adapter that does not
    fit it, no_effect when the merged model does not say what the trained one said, disk_full.
    """
    if (base / STAGED).is_file():
        raise TrainingStopped("bad_base_model", f"{base}: a staged copy; merge into the model's own files")
    files, adapter_sha256 = BaseFiles(base), source.sha256[WEIGHTS]
    if files.sha256() != source.base_sha256:
        raise TrainingStopped("bad_base_model", f"{base}: not the base model the adapter was trained on")
    if to.exists():
        return _finished(to, source, precision)
    family = load_catalog().family_of(source.base_model)
    deltas = Deltas(source.adapter)
    deltas.require_places(name_in_model(name) for header in files.headers for name in header.tensors)
    work = to.with_name(f".{to.name}.merging")
    with alone(work):
        fresh = Unfinished(
            base_sha256=source.base_sha256, adapter_sha256=adapter_sha256, precision=precision, files={}, sums={}
        )
        done = _write(files, work, deltas, family, fresh, progress)
        _write_sides(files, work, precision)
        error, limit = _probed(source, base, work, family, precision)
    record = MergedModel(
        job_id=source.job_id,
        base_model=source.base_model,
        base_revision=source.base_revision,
        base_sha256=source.base_sha256,
        adapter_sha256=adapter_sha256,
        precision=precision,
        files=done.files,
        survival=survival(done.sums.values()),
        probe_error=error,
        probe_limit=limit,
    )
    write_record(work / MERGED, record)
    for name in (UNFINISHED, LOCK):
        (work / name).unlink()
    os.replace(work, to)
    return record


def job_source(job: Path) -> Source:
    """A job folder: adapter/, launch.json, result.json, probe.safetensors. Raises TrainingStopped."""
    spec, result = read_record(LaunchSpec, job / "launch.json"), read_record(Result, job / "result.json")
    if spec is None or result is None or result.outcome != "completed":
        raise TrainingStopped("bad_data", f"{job}: no finished training to merge")
    if not (job / "probe.safetensors").is_file():
        raise TrainingStopped("bad_data", f"{job}: no probe.safetensors; give the adapter's folder to merge without it")
    base = (spec.recipe.base.id, result.base_revision, result.base_sha256)
    sums = result.adapter_sha256
    return _whole(Source(job / "adapter", spec.job_id, *base, sums, spec, job / "probe.safetensors"))


def adapter_source(adapter: Path) -> Source:
    """An adapter's folder with its manifest.json. Raises TrainingStopped."""
    manifest = read_record(Manifest, adapter / "manifest.json")
    if manifest is None:
        raise TrainingStopped("bad_data", f"{adapter}: neither a job folder nor an adapter with its manifest.json")
    base = (manifest.base_model, manifest.base_revision, manifest.base_sha256)
    return _whole(Source(adapter, manifest.job_id, *base, manifest.files, None, None))


def _whole(source: Source) -> Source:
    for name, sha256 in source.sha256.items():
        path = source.adapter / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise TrainingStopped("bad_data", f"{path}: not the file that was proved; pull the adapter again")
    if WEIGHTS not in source.sha256 or source.base_model not in load_catalog().models:
        raise TrainingStopped("bad_data", f"{source.adapter}: no {WEIGHTS} for a model of recipes/models.yaml")
    return source


def _finished(to: Path, source: Source, precision: Precision) -> MergedModel:
    found = read_record(MergedModel, to / MERGED)
    wanted = (source.base_sha256, source.sha256[WEIGHTS], precision)
    if found is None or (found.base_sha256, found.adapter_sha256, found.precision) != wanted:
        raise TrainingStopped("bad_data", f"{to}: it is there and not this merge; name a new folder")
    return found


def _write(
    files: BaseFiles,
    work: Path,
    deltas: Deltas,
    family: Family,
    fresh: Unfinished,
    progress: Callable[[int, int], None],
) -> Unfinished:
    """Every file of the base, merged; those that an earlier start left whole are kept."""
    work.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[fresh.precision]
    layouts = {header.path.name: _layout(header, dtype) for header in files.headers}
    sizes = {name: sum(like.nbytes for like in layout.values()) for name, layout in layouts.items()}
    begun = read_record(Unfinished, work / UNFINISHED)
    same = begun and begun.model_copy(update={"files": {}, "sums": {}}) == fresh
    whole = dict(begun.files) if begun and same else {}
    sums = dict(begun.sums) if begun and same else {}
    whole = {n: f for n, f in whole.items() if (work / n).is_file() and file_sha256(work / n) == f.sha256}
    require_room(work, sum(size for name, size in sizes.items() if name not in whole))
    done = fresh
    for number, header in enumerate(files.headers, start=1):
        name = header.path.name
        if name not in whole:
            found: dict[str, Sums] = {}
            with ShardWriter(work / name, layouts[name], header.metadata) as shard:
                for tensor, like in layouts[name].items():
                    shard.put(tensor, _merged(header, tensor, like.dtype, deltas, family, found))
            whole[name], sums[name] = shard.described, found
        done = fresh.model_copy(update={"files": whole, "sums": sums})
        write_record(work / UNFINISHED, done)
        progress(sum(list(sizes.values())[:number]), sum(sizes.values()))
    return done


def _layout(header: Header, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors in their order, those of the model itself in the target precision."""
    layout = {}
    for name in header.in_order():
        like = header.empty(name, device="meta")
        if like.dtype.itemsize == 1 and like.dtype.is_floating_point:
            raise TrainingStopped("bad_base_model", f"{header.path}: {name} is quantised; merge into bf16 weights")
        layout[name] = like.to(dtype) if like.dtype in _FLOATS and not name.startswith("mtp.") else like
    return layout


def _merged(
    header: Header, name: str, dtype: torch.dtype, deltas: Deltas, family: Family, sums: dict[str, Sums]
) -> Iterator[Tensor]:
    """The parts of one tensor with the adapter's change; a stack comes expert by expert."""
    shape = header.tensors[name]["shape"]
    for expert in range(shape[0]) if len(shape) == 3 and ".experts." in name else (None,):
        weight = header.read(name, expert)
        delta = deltas.of(name_in_model(name), expert) if not name.startswith("mtp.") else None
        if delta is None:
            yield weight.to(dtype)
            continue
        if delta.shape != weight.shape:
            said = f"{tuple(delta.shape)} for {tuple(weight.shape)}"
            raise TrainingStopped("bad_targets", f"{name}: the adapter's change has shape {said}")
        merged = (weight.float() + delta).to(dtype)
        group = group_of(name_in_model(name), family)
        sums[group] = added(sums.get(group, Sums()), delta, merged, weight.to(dtype))
        yield merged


def _write_sides(files: BaseFiles, work: Path, precision: Precision) -> None:
    copy_side_files(files.folder, work)
    index = files.folder / INDEX
    if index.is_file():
        value = json.loads(index.read_bytes()) | {"metadata": {}}
        (work / INDEX).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    config = json.loads((work / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    config["dtype"] = str(DTYPES[precision]).removeprefix("torch.")
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _probed(
    source: Source, base: Path, work: Path, family: Family, precision: Precision
) -> tuple[float | None, float | None]:
    """(RMS difference to the trained model's log-probabilities, the most it may be). Raises TrainingStopped."""
    if source.probe is None or source.spec is None:
        return None, None
    conversations, base_said, trained = probe.read_probe(source.probe)
    said = _log_probabilities(work, family, precision, conversations)
    if source.spec.recipe.hardware.quantize:
        # The adapter was trained on rounded weights: what it changes is compared, not what either base says.
        here = _log_probabilities(base, family, precision, conversations)
        said = [s - h + b for s, h, b in zip(said, here, base_said, strict=True)]
    coarse = "bf16" if "bf16" in (precision, source.spec.recipe.training.precision) else "fp32"
    error, limit = probe.rms(trained, said), probe.REPRODUCTION_LIMIT[coarse] * probe.rms(base_said, trained)
    if not error <= limit:
        shutil.rmtree(work)
        raise TrainingStopped(
            "no_effect",
            f"the merged model does not say what the trained model said: error {error:.1e}, at most {limit:.1e}; "
            "serve the adapter unmerged, or merge with --precision fp32",
        )
    return error, limit


def _log_probabilities(folder: Path, family: Family, precision: Precision, conversations: Any) -> list[Any]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[precision],
        device_map="auto" if torch.cuda.is_available() else None,
        **loading(family),
    )
    refuse_incomplete(info)
    said = probe.log_probabilities(model.eval(), conversations, next(model.parameters()).device)
    del model
    gc.collect()
    return said


def main() -> int:
    """Exit code 0, or recipes.causes.EXIT_CODES of the cause, with a sentence on standard error."""
    parser = argparse.ArgumentParser(description="Merges an adapter into its base model.")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--job", type=Path, help="the job folder")
    given.add_argument("--adapter", type=Path, help="an adapter's folder; merged without the job's probe")
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    a = parser.parse_args()
    return exit_code(
        lambda: merge(job_source(a.job) if a.job else adapter_source(a.adapter), a.base, a.to, a.precision, say)
    )


if __name__ == "__main__":
    sys.exit(main())
