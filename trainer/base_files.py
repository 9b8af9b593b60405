"""The base model's files: is every one whole, which exact base is it, and the bytes of one tensor."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from recipes.catalog import Family
from recipes.job import read_record
from recipes.staged import STAGED, StagedModel
from trainer.failures import TrainingStopped
from trainer.shards import Header

BLOCK = 64 * 1024
BLOCKS = 16
FP8, MXFP4 = "fp8", "mxfp4"
"Ways of quantising that publishers write in config.json."


class BaseFiles:
    """The safetensors files of a model folder. Raises TrainingStopped when one is missing or cut off."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise TrainingStopped("bad_base_model", f"{folder}: no config.json; stage the base model there")
        self._files = _weight_files(folder)
        self.headers = [Header(path) for path in self._files]
        self._where = {name_in_model(name): (header, name) for header in self.headers for name in header.tensors}

    @property
    def quantised_by(self) -> str | None:
        """The method by which the publisher quantised the checkpoint, as its config.json says."""
        config = json.loads((self.folder / "config.json").read_bytes())
        return (config.get("quantization_config") or {}).get("quant_method")

    def sha256(self) -> str:
        """Names the exact base without reading 160 GB: SHA-256 over config.json, then the sorted
        (tensor name, shape, dtype) of all files, then for each file its size and 16 blocks of 64 KiB spread evenly
        from its first to its last byte (the whole file where it is smaller than that).

        Two trainings of one architecture differ in nearly every weight, so in the sampled blocks too. A staged model
        names the base that it was made of.
        """
        if staged := read_record(StagedModel, self.folder / STAGED):
            return staged.base_sha256
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        tensors = sorted(
            (name, header.tensors[name]["shape"], header.tensors[name]["dtype"])
            for header, name in self._where.values()
        )
        digest.update(json.dumps(tensors).encode())
        for path in self._files:
            size = path.stat().st_size
            digest.update(f"{size}".encode())
            with path.open("rb") as file:
                for offset in _sample_offsets(size):
                    file.seek(offset)
                    digest.update(file.read(BLOCK))
        return digest.hexdigest()

    def tensor(self, name: str) -> Any:
        """The tensor as the model holds it (torch, CPU, the file's dtype); a fused expert stack is put together.

        gate_up_proj is (experts, 2 x intermediate, hidden): gate above up; down_proj is (experts, hidden,
        intermediate). Raises TrainingStopped when the files have no such tensor.
        """
        if name in self._where:
            header, name_in_file = self._where[name]
            return header.read(name_in_file)
        return torch.stack(list(self.matrices(name)))

    def matrices(self, name: str) -> Iterator[Any]:
        """The matrices of a fused expert stack one after the other, from either layout of the files.

        Raises TrainingStopped when the files have no such stack.
        """
        if name in self._where:
            header, name_in_file = self._where[name]
            yield from (header.read(name_in_file, e) for e in range(header.tensors[name_in_file]["shape"][0]))
            return
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if f"{name}_blocks" in self._where:
            yield from self._decoded(name)
            return
        if not match or f"{match[1]}.0.down_proj.weight" not in self._where:
            raise TrainingStopped("bad_base_model", f"{self.folder}: no tensor {name} in its files")
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for e in itertools.count():
            if f"{match[1]}.{e}.down_proj.weight" not in self._where:
                return
            yield torch.cat([self.tensor(f"{match[1]}.{e}.{part}.weight") for part in parts])

    def dtype(self, name: str) -> Any:
        """The dtype in which the files hold a tensor of the model. Raises TrainingStopped when they do not."""
        if f"{name}_blocks" in self._where:
            return torch.bfloat16
        header, name_in_file = self._where.get(name) or self._where_expert(name)
        return header.empty(name_in_file, device="meta").dtype

    def _decoded(self, stack: str) -> Iterator[Any]:
        """The matrices of a stack in MXFP4, where 32 values of 4 bits share a power of two, in bf16, which is exact."""
        blocks, blocks_name = self._where[f"{stack}_blocks"]
        scales, scales_name = self._where[f"{stack}_scales"]
        for e in range(blocks.tensors[blocks_name]["shape"][0]):
            matrix, exponents = blocks.read(blocks_name, e), scales.read(scales_name, e)
            yield convert_moe_packed_tensors(matrix[None], exponents[None])[0]

    def _where_expert(self, stack: str) -> tuple[Header, str]:
        experts = stack.rpartition(".")[0]
        found = self._where.get(f"{experts}.0.down_proj.weight") if experts.endswith(".experts") else None
        if found is None:
            raise TrainingStopped("bad_base_model", f"{self.folder}: no tensor {stack} in its files")
        return found


def loading(family: Family) -> dict[str, Any]:
    """How trainer and proof load a model: alike, or a near-tie in the router may fall otherwise."""
    safe = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    # Eager experts call a module once per expert that got a token: ranks then record different traces and ZeRO-3 hangs.
    return safe | ({"experts_implementation": "grouped_mm"} if family.moe_block else {})


def refuse_incomplete(info: dict[str, Any]) -> None:
    """Refuses weights that were left random or had no place in the model."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            first = sorted(str(key) for key in info[kind])[0]
            raise TrainingStopped(
                "bad_base_model",
                f"the base model's files do not fit its config.json: {kind.replace('_', ' ')}: {first}",
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_in_model(name: str) -> str:
    """A checkpoint with a vision tower keeps its text part, which is all we load, one level deeper."""
    return name.replace("model.language_model.", "model.", 1)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if os.path.basename(name) != name or not (folder / name).is_file():
            raise TrainingStopped("bad_base_model", f"{folder}: {name} is missing; stage the base model again")
    return [folder / name for name in names]


def _sample_offsets(size: int) -> list[int]:
    if size <= BLOCK * BLOCKS:
        return list(range(0, size, BLOCK))
    return [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
