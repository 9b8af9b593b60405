"""The real trainer in a training job of a local SageMaker: recipe, training set and base model from channels."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.backends.sagemaker_request import METRICS
from scripts.cli import main
from scripts.pull import pull
from scripts.store import open_store
from scripts.watch import watch
from tests.runpod.test_real_trainer import smoke_spec
from tests.sagemaker.conftest import KEYS, SETTINGS, Room
from tests.sagemaker.fake_sagemaker import SageMaker


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_smoke_recipe_trains_on_sagemaker_to_a_verified_adapter(
    make_account: Callable[..., SageMaker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    account = make_account()
    account.variables["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    spec = smoke_spec(tmp_path / "data", "real-1", "sagemaker", 9.0)
    room = Room(account, open_store(spec.store), tmp_path / "data", spec, SETTINGS)
    handle = room.launch().handle
    out = io.StringIO()
    state = watch(room.store, "real-1", room.backend, out, poll_seconds=0.5)
    assert state.state == "completed", out.getvalue() + room.said()
    room.finish()
    manifest = pull(room.store, "real-1", tmp_path / "adapter")
    assert manifest.effect > 0
    assert (manifest.base_model, manifest.recipe_name) == ("lorry/smoke", "smoke/zero3")
    said = "\n".join(room.backend.logs(handle))
    found = {name: re.findall(regex, said) for name, regex in METRICS.items()}
    assert [len(found[name]) for name in ("train:loss", "train:learning_rate", "train:gradient_norm")] == [4, 4, 4]
    assert [float(loss) for loss in found["validation:loss"]][-1] == pytest.approx(manifest.final_validation_loss)
    disks = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in disks if any(key.encode() in path.read_bytes() for key in KEYS.values())] == []
    for name, value in {**SETTINGS, "LORRY_STORE": spec.store}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    capsys.readouterr()
    assert main(["cost", "real-1", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    seconds = account.jobs[handle["training_job"]].on_seconds
    assert cost["settlement"]["source"] == "bill"
    assert cost["usd"] == pytest.approx(int(seconds) / 3600 * 7.912, abs=1e-5)
    assert main(["reap", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"] == []
