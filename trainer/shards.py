"""safetensors files read and written front to back: no memory map, no second pass, checksums on the way.

for name, tensor in read_shard(header, crc32, device): ...           # the sum is compared behind the last one
with ShardWriter(path, layout) as shard: shard.put(name, [tensor])   # in the order of `layout`
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from recipes.staged import StagedFile
from trainer.failures import TrainingStopped

HEADER_LIMIT = 100_000_000
"The limit safetensors itself sets."
CHUNK = 4 * 2**20
"Bytes read or written at a time: what was just read is still in the processor's cache when it is summed."
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header:
    """Where each tensor of one file lies. Raises TrainingStopped when the file is no safetensors file or is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.start, self.tensors = _parsed(file)
        self.metadata: dict[str, str] = self.tensors.pop("__metadata__", {})
        try:
            end = self.start + _require_gapless(self.tensors)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TrainingStopped("bad_base_model", f"{path}: not a safetensors file; stage it again") from None
        if end != (size := path.stat().st_size):
            raise TrainingStopped("bad_base_model", f"{path}: {size} bytes, its header says {end}; stage it again")

    def in_order(self) -> list[str]:
        """The names, as the bytes lie."""
        return sorted(self.tensors, key=lambda name: self.tensors[name]["data_offsets"])

    def empty(self, name: str, *, matrix: bool = False, device: Any = None) -> Tensor:
        """A tensor of that dtype and shape, or of one matrix of that stack, without numbers yet.

        Raises TrainingStopped for a dtype that torch lacks.
        """
        entry = self.tensors[name]
        if entry["dtype"] not in DTYPES:
            raise TrainingStopped("bad_base_model", f"{self.path}: {name} is {entry['dtype']}, which torch cannot read")
        shape = entry["shape"][1:] if matrix else entry["shape"]
        return torch.empty(shape, dtype=DTYPES[entry["dtype"]], device=device)

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """One tensor, or one matrix of a stack, by a plain read at its place."""
        tensor = self.empty(name, matrix=expert is not None)
        with self.path.open("rb") as file:
            file.seek(self.start + self.tensors[name]["data_offsets"][0] + (expert or 0) * tensor.nbytes)
            for part in _parts(tensor):
                _fill(file, part)
        return tensor


def read_shard(header: Header, crc32: int, device: Any) -> Iterator[tuple[str, Tensor]]:
    """Reads a whole file once, front to back: each tensor on `device`, as the bytes lie.

    Raises TrainingStopped behind the last one when the bytes were not those of `crc32`.
    """
    with header.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        found = zlib.crc32(file.read(header.start))
        for name in header.in_order():
            tensor = header.empty(name, device="meta")
            on_cpu = torch.device(device).type == "cpu"
            tensor = _in_large_pages(tensor) if on_cpu else torch.empty_like(tensor, device=device)
            found = _read_to_cpu(file, tensor, found) if tensor.is_cpu else _read_to_gpu(file, tensor, found)
            yield name, tensor
    if found != crc32:
        where = header.path.parent.name
        raise TrainingStopped(
            "bad_base_model", f"{header.path}: its checksum differs from {where}'s record; stage it again"
        )


class ShardWriter:
    """One file, written under a temporary name in the order of `layout` (name -> meta tensor), then renamed.

    Leaving the block without an error closes it; `described` then holds its size and sums.
    """

    described: StagedFile

    def __init__(self, path: Path, layout: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._path, self._left = path, dict(layout)
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._sha256, self._crc32, self._bytes = hashlib.sha256(), 0, 0
        self._write(_header(layout, metadata))

    def put(self, name: str, parts: Iterable[Tensor]) -> None:
        """The next tensor, whole or as the parts of which it is the concatenation.

        Raises ValueError when it is not the one that `layout` has next.
        """
        wanted = next(iter(self._left), None)
        like = self._left.pop(name) if name == wanted else None
        begin = self._bytes
        for part in parts:
            if like is not None and part.dtype == like.dtype:
                for data in _parts(part.detach().cpu().contiguous()):
                    self._write(data)
        if like is None or self._bytes - begin != like.nbytes:
            raise ValueError(f"{self._path.name}: {self._bytes - begin} bytes of {name}; it wants {wanted} {like}")

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self._bytes += len(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is not None:
                return
            if self._left:
                raise ValueError(f"{self._path.name}: {next(iter(self._left))} was not written")
            self._file.flush()
            os.fsync(self._file.fileno())
        os.replace(self._temporary, self._path)
        self.described = StagedFile(bytes=self._bytes, sha256=self._sha256.hexdigest(), crc32=self._crc32)


def _header(layout: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    at = 0
    for name, like in layout.items():
        size = math.prod(like.shape) * like.element_size()
        entries[name] = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parsed(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """(offset of the data, the header): 8 bytes little-endian length, then JSON."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 2 <= length <= HEADER_LIMIT:
            raise ValueError
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise TrainingStopped("bad_base_model", f"{file.name}: not a safetensors file; stage it again") from None
    return 8 + length, header


def _require_gapless(tensors: Mapping[str, Any]) -> int:
    """Where the data ends. Raises KeyError, TypeError, ValueError or AttributeError unless every tensor has its bytes
    and each begins where another ends."""
    at = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if begin != at or end < begin or (dtype and math.prod(entry["shape"]) * dtype.itemsize != end - begin):
            raise ValueError
        at = end
    return at


def _in_large_pages(like: Tensor) -> Tensor:
    """Memory for a tensor in pages of 2 MiB where the kernel has them: a fault every 4 KiB costs more than reading."""
    if like.nbytes < CHUNK:
        return torch.empty_like(like, device="cpu")
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def _parts(tensor: Tensor) -> list[memoryview]:
    """The memory of a contiguous CPU tensor, CHUNK bytes at a time."""
    if not tensor.numel():
        return []
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    return [view[at : at + CHUNK] for at in range(0, len(view), CHUNK)]


def _fill(file: BinaryIO, part: memoryview) -> None:
    if file.readinto(part) != len(part):  # type: ignore[attr-defined]  # a buffered reader reads until it is full
        raise TrainingStopped("bad_base_model", f"{file.name}: it ends early; stage it again")


def _read_to_cpu(file: BinaryIO, target: Tensor, crc32: int) -> int:
    for part in _parts(target):
        _fill(file, part)
        crc32 = zlib.crc32(part, crc32)
    return crc32


def _read_to_gpu(file: BinaryIO, target: Tensor, crc32: int) -> int:
    """Through two pinned buffers, so that one is copied while the other is filled."""
    flat = target.view(-1).view(torch.uint8)
    buffers = [torch.empty(min(CHUNK, flat.numel()), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copied: list[Any] = [None, None]
    for number, at in enumerate(range(0, flat.numel(), CHUNK)):
        slot = number % 2
        if copied[slot] is not None:
            copied[slot].synchronize()
        part = buffers[slot][: min(CHUNK, flat.numel() - at)]
        crc32 = _read_to_cpu(file, part, crc32)
        flat[at : at + len(part)].copy_(part, non_blocking=True)
        copied[slot] = torch.cuda.Event()
        copied[slot].record()
    torch.cuda.current_stream().synchronize()
    return crc32
