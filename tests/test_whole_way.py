"""The whole way at a terminal, everything real: check, plan, launch, DeepSpeed over two processes, proof, store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SET = ROOT / "examples" / "bicycle-care.jsonl"


@dataclass(frozen=True)
class Terminal:
    """A person at a terminal, in a folder of their own."""

    folder: Path
    environment: dict[str, str]

    def lorry(self, *words: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "scripts.cli", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def _terminal(folder: Path, models: Path, **more: str) -> Terminal:
    environment = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "LORRY_MODELS": str(models),
    }
    return Terminal(folder, environment | more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("way")


@pytest.fixture(scope="module")
def terminal(home: Path) -> Terminal:
    (home / "desk").mkdir()
    return _terminal(home / "desk", home / "models", LORRY_STORE=(home / "jobs").as_uri())


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    """The smoke recipe, shortened: two epochs are enough to see the loss fall."""
    text = (ROOT / "recipes" / "smoke" / "zero3.yaml").read_text()
    path = home / "short.yaml"
    path.write_text(text.replace("epochs: 4", "epochs: 2"))
    return path


@pytest.fixture(scope="module")
def job(terminal: Terminal, recipe: Path, home: Path) -> Path:
    done = terminal.lorry("run", str(recipe), "--training-set", str(SET), "--job", "way-1")
    assert done.returncode == 0, done.stderr
    assert "proof" in done.stdout
    return home / "jobs" / "way-1"


def test_a_training_set_becomes_a_verified_adapter(job: Path) -> None:
    result, proof = (json.loads((job / name).read_text()) for name in ("result.json", "proof.json"))
    assert result["final_validation_loss"] < result["initial_validation_loss"]
    assert proof["passed"]
    assert proof["tensors_consumed"] == proof["tensors"] > 0
    manifest = json.loads((job / "adapter" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest["training_set_sha256"]
    assert manifest["cost_usd"] == 0.0
    assert "<svg" in (job / "report.html").read_text()


def test_the_job_is_listed_and_shown(terminal: Terminal, job: Path) -> None:
    listed = terminal.lorry("jobs")
    assert "way-1" in listed.stdout
    assert "completed" in listed.stdout
    shown = json.loads(terminal.lorry("show", "way-1", "--json").stdout)
    assert shown["state"]["state"] == "completed"
    assert shown["status"]["training_loss"] is not None
    assert isinstance(shown["status"]["epoch"], int)


def test_the_plan_of_the_job_is_compared_with_what_came(terminal: Terminal, job: Path) -> None:
    rows = json.loads(terminal.lorry("bench", "plan", "way-1", "--json").stdout)["jobs"]["way-1"]
    real = {row["what"]: row["real"] for row in rows}
    assert real["seconds per step"] > 0
    assert real["minutes to first figure"] > 0
    assert real["peak GiB"] == json.loads((job / "result.json").read_text())["peak_gib"]
    assert real["dollars, quoted"] == 0.0
    assert all(row["planned"] is not None for row in rows)


def test_running_the_same_job_again_trains_nothing(terminal: Terminal, recipe: Path, job: Path) -> None:
    before = (job / "result.json").stat().st_mtime_ns
    again = terminal.lorry("run", str(recipe), "--training-set", str(SET), "--job", "way-1")
    assert again.returncode == 0, again.stderr
    assert (job / "result.json").stat().st_mtime_ns == before


def test_the_same_job_id_for_another_recipe_is_a_conflict(terminal: Terminal, job: Path) -> None:
    other = terminal.lorry("launch", "smoke/zero3", "--training-set", str(SET), "--job", "way-1")
    assert other.returncode == 5
    assert "way-1" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_fetched_adapter_is_verified_and_one_flipped_bit_is_caught(terminal: Terminal, job: Path, home: Path) -> None:
    fetched = home / "fetched"
    assert terminal.lorry("pull", "way-1", str(fetched)).returncode == 0
    assert terminal.lorry("verify", str(fetched)).returncode == 0
    wrong_base = terminal.lorry("verify", str(fetched), "--base", "Qwen/Qwen3-8B")
    assert wrong_base.returncode == 7
    file = fetched / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    broken = terminal.lorry("verify", str(fetched))
    assert broken.returncode == 7
    assert "adapter_model.safetensors" in broken.stderr


def test_an_unusable_set_is_refused_before_anything_starts(terminal: Terminal, home: Path) -> None:
    bad = home / "bad.jsonl"
    bad.write_text('{"chosen": "a", "rejected": "b", "prompt": "c"}\n')
    done = terminal.lorry("run", "smoke/zero3", "--training-set", str(bad), "--job", "way-bad")
    assert done.returncode == 2
    assert "bad.jsonl:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "jobs" / "way-bad").exists()


@pytest.fixture
def bucket() -> Iterator[str]:
    """The URL of a real S3 API on this machine, with one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    ).create_bucket(Bucket="way")
    yield url
    server.stop()


@pytest.mark.slow
def test_a_job_in_a_bucket_is_stopped_from_another_terminal_and_goes_on(home: Path, recipe: Path, bucket: str) -> None:
    """Launch, stop after the first checkpoint, see it cancelled; then the same training from the start completes."""
    (home / "far").mkdir()
    far = _terminal(
        home / "far",
        home / "models",
        LORRY_STORE="s3://way/jobs",
        AWS_ENDPOINT_URL=bucket,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    assert far.lorry("launch", str(recipe), "--training-set", str(SET), "--job", "far-1").returncode == 0
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        shown = json.loads(far.lorry("show", "far-1", "--json").stdout)
        if (shown.get("status") or {}).get("step", 0) >= 2:
            break
        time.sleep(1)
    else:
        pytest.fail(f"no step was seen in the bucket: {shown}")
    assert far.lorry("stop", "far-1", "--reason", "lunch").returncode == 0
    watched = far.lorry("watch", "far-1")
    assert watched.returncode == 6
    assert "cancelled" in watched.stdout + watched.stderr

    done = far.lorry("run", str(recipe), "--training-set", str(SET), "--job", "far-2")
    assert done.returncode == 0, done.stderr
    fetched = home / "far-adapter"
    assert far.lorry("pull", "far-2", str(fetched)).returncode == 0
    assert far.lorry("verify", str(fetched)).returncode == 0
