"""A conversion needs the memory of a matrix and a stack, goes on after kill -9, and does not begin what cannot end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.staging.test_staged import staged
from trainer.failures import TrainingStopped
from trainer.quantize import SPARE_BYTES

ROOT = Path(__file__).parent.parent.parent
# The kernel gives freed blocks back at once; otherwise the resident set says nothing about peaks.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | HONEST_MALLOC, capture_output=True, text=True, timeout=280
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import trainer.quantize as q
put = q.ShardWriter.put
def killing(self, name, parts):
    if name.startswith("model.layers.1.mlp.experts.down_proj"):
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, parts)
q.ShardWriter.put = killing
q.quantise(Path(sys.argv[1]), Path(sys.argv[2]), "int8", model="toy", revision=None, say=lambda d, t: None)
"""


def test_killed_in_the_middle_of_a_file_it_goes_on_behind_the_last_whole_one(base: Any, tmp_path: Path) -> None:
    folder, killed, straight = base("qwen3_next"), tmp_path / "killed", tmp_path / "straight"
    assert run(KILLED, str(folder), str(killed)).returncode == -signal.SIGKILL
    begun = {path.name: path.stat().st_mtime_ns for path in killed.glob("model-*.safetensors")}
    assert sorted(begun) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert (killed / ".model-00003-of-00004.safetensors.tmp").exists()
    used = shutil.copytree(killed, tmp_path / "used")

    record = staged(folder, killed, "int8")
    assert {name: (killed / name).stat().st_mtime_ns for name in begun} == begun, "they were kept"
    assert record == staged(folder, straight, "int8")
    assert {path.name for path in killed.iterdir()} == {path.name for path in straight.iterdir()}

    other = base("qwen3_next", moe_intermediate_size=16)
    assert staged(other, used, "int8").files == staged(other, tmp_path / "other", "int8").files


def test_a_disk_that_is_too_small_is_left_alone(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SPARE_BYTES + 50_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, free))
    with pytest.raises(TrainingStopped, match=r"1\.0 GB are free, 0\.0 GB are needed and 1 GB kept free") as stopped:
        staged(base("qwen3_next"), tmp_path, "int8")
    assert stopped.value.cause == "disk_full"
    assert list(tmp_path.glob("model*")) == []


PEAK = """
import sys
from pathlib import Path
import trainer.quantize as q
def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
def go(base, to, kind):
    q.quantise(Path(base), Path(to), kind, model="toy", revision=None, say=lambda d, t: None)
for kind in ("nf4", "bf16"):
    go(sys.argv[1], sys.argv[3] + f"/small.{kind}", kind)  # imports and buffers are no part of the question
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    go(sys.argv[2], sys.argv[3] + f"/big.{kind}", kind)
    print((status("VmHWM") - before) / 1024)
"""
BIG = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 64, "num_hidden_layers": 6}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(base: Any, tmp_path: Path) -> None:
    """Six layers of 24 MiB of experts each, 145 MiB in all: fused or quantised, less than one layer is held."""
    small, big = base("qwen3_moe"), base("qwen3_moe", **BIG)
    assert sum(path.stat().st_size for path in big.glob("*.safetensors")) > 6 * 24 * 2**20
    done = run(PEAK, str(small), str(big), str(tmp_path))
    assert done.returncode == 0, done.stderr
    nf4, bf16 = (float(line) for line in done.stdout.split())
    assert nf4 < 24
    assert bf16 < 24


def test_a_quantised_base_is_refused(base: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base("qwen3"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(TrainingStopped, match="it is quantised already; give the bf16 checkpoint"):
        staged(folder, tmp_path / "to", "int8")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(TrainingStopped, match=f"{name} is torch.float8_e4m3fn; give the bf16 checkpoint"):
        staged(folder, tmp_path / "to", "int8")


def test_a_base_that_does_not_fit_its_configuration_is_refused(base: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base("qwen3_moe"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    with pytest.raises(TrainingStopped, match=r"does not fit its config\.json"):
        staged(folder, tmp_path / "to", "int8")


def test_a_model_of_no_known_family_is_refused(base: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base("qwen3"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(TrainingStopped, match="model_type is 'qwen2', of no family"):
        staged(folder, tmp_path / "to", "int8")
