"""The web app's calls of every generation against the queue contract and the older routes."""

from __future__ import annotations

from typing import Any

import httpx

from scripts.adapter import verify_adapter
from tests.gateway.conftest import Front


def test_a_job_goes_from_run_to_an_adapter_that_can_be_fetched(front: Front, tmp_path: Any) -> None:
    answer = front.post("/v2/lorry/run", {"input": front.input()})
    assert answer.status_code == 200, answer.text
    accepted = answer.json()
    assert (accepted["id"], accepted["status"]) == (front.input()["job_id"], "IN_QUEUE")
    assert accepted["understood"]["epochs"] == 2
    done = front.finish(accepted["id"])
    assert done["status"] == "COMPLETED", front.log(accepted["id"])
    output = done["output"]
    assert output["progress"] == 100
    assert set(output["model_files"]) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    (tmp_path / "home").mkdir()
    for name, link in output["model_files"].items():
        fetched = httpx.get(link)
        assert fetched.status_code == 200, link
        (tmp_path / "home" / name).write_bytes(fetched.content)
    assert verify_adapter(tmp_path / "home").job_id == accepted["id"]
