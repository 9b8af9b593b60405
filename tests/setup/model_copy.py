"""A base model of a few kilobytes, as a hub or a download would leave it on a disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

MODEL = "Qwen/Qwen3-8B"
NAME = "Qwen--Qwen3-8B"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
STAGED = sorted(["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json", *SHARDS])


def write_shard(path: Path, tensor: str, values: int, fill: int = 1) -> None:
    header = json.dumps({tensor: {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(bytes([fill]) * values if values < 10**7 else b"")
        file.truncate(8 + len(header) + values)


def make_copy(folder: Path, values: int = 5000) -> Path:
    """A model as the hub has it, with code and pickles beside the files that are wanted."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for number, shard in enumerate(SHARDS):
        write_shard(folder / shard, f"t{number}", values)
    index = {"weight_map": {f"t{number}": shard for number, shard in enumerate(SHARDS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for unwanted in ("pytorch_model.bin", "modeling_qwen.py", "README.md", ".gitattributes"):
        (folder / unwanted).write_bytes(b"\x80\x04 not wanted")
    write_shard(folder / "consolidated.safetensors", "t0", 100)
    return folder
