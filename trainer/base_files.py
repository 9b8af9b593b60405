"""The base model's files: is every one whole, which exact base is it, and the bytes of one tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from recipes.catalog import Family
from trainer.failures import TrainingStopped

BLOCK = 64 * 1024
BLOCKS = 16
HEADER_LIMIT = 100_000_000
"The limit safetensors itself sets."


class BaseFiles:
    """The safetensors files of a model folder. Raises TrainingStopped when one is missing or cut off."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise TrainingStopped("bad_base_model", f"{folder}: no config.json; stage the base model there")
        self._files = _weight_files(folder)
        self._headers = {path: _header(path) for path in self._files}
        self._where = {
            _name_in_model(name): (path, name)
            for path, header in self._headers.items()
            for name in header
            if name != "__metadata__"
        }

    def sha256(self) -> str:
        """Names the exact base without reading 160 GB: SHA-256 over config.json, then the sorted
        (tensor name, shape, dtype) of all files, then for each file its size and 16 blocks of 64 KiB spread evenly
        from its first to its last byte (the whole file where it is smaller than that).

        Two trainings of one architecture differ in nearly every weight, so in the sampled blocks too.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        tensors = sorted(
            (name, self._headers[path][name]["shape"], self._headers[path][name]["dtype"])
            for path, name in self._where.values()
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
            return self._read(name)
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if match and f"{match[1]}.0.down_proj.weight" in self._where:
            experts = [e for e in range(len(self._where)) if f"{match[1]}.{e}.down_proj.weight" in self._where]
            parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            return torch.stack(
                [torch.cat([self._read(f"{match[1]}.{e}.{part}.weight") for part in parts]) for e in experts]
            )
        raise TrainingStopped("bad_base_model", f"{self.folder}: no tensor {name} in its files")

    def _read(self, name: str) -> Any:
        path, name_in_file = self._where[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(name_in_file)


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


def _name_in_model(name: str) -> str:
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


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = _parsed_header(file)
    end = max((t["data_offsets"][1] for n, t in header[1].items() if n != "__metadata__"), default=0)
    if header[0] + end != path.stat().st_size:
        raise TrainingStopped(
            "bad_base_model", f"{path}: {path.stat().st_size} bytes, its header says {header[0] + end}; stage it again"
        )
    return header[1]


def _parsed_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """(offset of the data, the header): 8 bytes little-endian length, then JSON."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 2 <= length <= HEADER_LIMIT:
            raise ValueError
        header = json.loads(file.read(length))
    except ValueError:
        raise TrainingStopped("bad_base_model", f"{file.name}: not a safetensors file; stage it again") from None
    return 8 + length, header


def _sample_offsets(size: int) -> list[int]:
    if size <= BLOCK * BLOCKS:
        return list(range(0, size, BLOCK))
    return [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
