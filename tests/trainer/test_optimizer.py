"""The optimizers: what they hold in which precision, that the plan counts it, and that 8 bits train as 32 do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recipes.catalog import load_catalog
from scripts.plan.storage import storage_of
from trainer.adamw_8bit import AdamW8bit, Coded
from trainer.environment import Place
from trainer.replica import Replica

CPU = Place(0, 1, torch.device("cpu"), False)
REPLICA = {"engine": "replica", "quantize": "int8", "gpus": 1}


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A process group of this process alone, unless another test of this process has left one."""
    if not dist.is_initialized():
        store = tmp_path_factory.mktemp("store") / "ranks"
        dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_decoded_encodes_to_the_same_codes(signed: bool) -> None:
    """A checkpoint holds moments in fp32: they must come back to the bit."""
    torch.manual_seed(0)
    values = torch.randn(7, 1000) * torch.logspace(-12, 0, 1000)
    values[0] = 0
    coded = Coded.of(values if signed else values.square(), signed)
    again = Coded.of(coded.values(), signed)
    assert torch.equal(coded.codes, again.codes)
    assert torch.equal(coded.scales, again.scales)
    assert torch.equal(coded.values() == 0, again.values() == 0)


def test_codes_are_near_and_a_second_moment_never_falls_to_zero() -> None:
    torch.manual_seed(0)
    mean = torch.randn(4, 4096)
    assert (Coded.of(mean, True).values() - mean).norm() < 0.012 * mean.norm()
    square = torch.logspace(-30, 0, 256)
    assert (Coded.of(square, False).values() > 0).all(), "it is divided by"
    assert not Coded.of(torch.zeros(300), False).values().any()


@pytest.mark.slow
def test_8_bit_moments_find_the_way_of_32() -> None:
    """Least squares with noise: 300 steps end at weights 1 % apart, and at the same loss."""
    ends = []
    for make in (torch.optim.AdamW, AdamW8bit):
        torch.manual_seed(1)
        weight, true, rows = torch.nn.Parameter(torch.randn(64, 300)), torch.randn(64, 300), torch.randn(500, 300)
        optimizer = make([weight], lr=1e-2, weight_decay=0.01)
        for _ in range(300):
            batch = rows[torch.randint(500, (32,))]
            (batch @ (weight - true).T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            ends.append((weight, float((rows @ (weight - true).T).square().mean())))
    assert (ends[0][0] - ends[1][0]).norm() < 0.02 * ends[0][0].norm()
    assert ends[1][1] == pytest.approx(ends[0][1], rel=0.02)


def replica(optimizer: str, jobs: Any) -> tuple[Replica, torch.nn.ParameterDict]:
    """The engine on one linear's LoRA in bf16 and one expert's in fp32, as it keeps them."""
    matrices = {"linear": torch.ones(64, 96, dtype=torch.bfloat16), "expert": torch.ones(8, 16, 48)}
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(matrix) for name, matrix in matrices.items()})
    engine = Replica(1e9, None, CPU)
    make = AdamW8bit if optimizer == "adamw_8bit" else torch.optim.AdamW
    engine.start(model, dict(model.named_parameters()), lambda masters: make(masters, lr=1e-5, weight_decay=0.0))
    return engine, model


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_plan_counts_the_bytes_that_are_held(optimizer: str, jobs: Any) -> None:
    engine, model = replica(optimizer, jobs)
    recipe = jobs.changed(jobs.recipe, {"hardware": REPLICA, "training": {"optimizer": optimizer, "precision": "bf16"}})
    planned = storage_of(recipe, 1, load_catalog().gpus["h100-sxm"])
    engine.begin(1e-5, 1)
    engine.backward(sum(matrix.float().sum() for matrix in model.values()))
    masters = list(engine._masters.values())
    values = sum(master.numel() for master in masters)
    assert sum(master.nbytes for master in masters) == planned.adapter_bytes * values
    assert sum(master.grad.nbytes for master in masters) == planned.gradient_bytes * values
    assert model["linear"].nbytes == planned.copy_bytes * model["linear"].numel()
    engine.end()
    held = 0
    for state in engine._optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            parts = (moment.codes, moment.scales) if isinstance(moment, Coded) else (moment,)
            held += sum(part.nbytes for part in parts)
    assert held == planned.optimizer_bytes * values


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_steps_too_small_for_bf16_add_up_in_an_fp32_master(optimizer: str, jobs: Any) -> None:
    """At 1.0 the next smaller bf16 number is 1/256 away; a step of 1e-5 alone would never leave."""
    engine, model = replica(optimizer, jobs)
    for _ in range(400):
        engine.begin(1e-5, 1)
        engine.backward(sum(matrix.float().sum() for matrix in model.values()))
        engine.end()
    assert engine.full("linear")["weight"].mean() == pytest.approx(1 - 400e-5, abs=1e-4)
    assert float(model["linear"].detach().float().mean()) == pytest.approx(1 - 1 / 256)


def test_a_norm_of_bf16_gradients_is_taken_in_fp32_and_clips_them(jobs: Any) -> None:
    engine, model = replica("adamw_8bit", jobs)
    engine._clipping = 1.0
    engine.begin(0.0, 1)
    engine.backward(sum(3 * matrix.float().sum() for matrix in model.values()))
    assert engine.end() == pytest.approx(3 * (64 * 96 + 8 * 16 * 48) ** 0.5, rel=1e-6)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_8_bit_training_falls_as_32_and_resumes_to_the_bit(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    ended = {}
    for optimizer in ("adamw", "adamw_8bit"):
        training = {"max_steps": 24, "checkpoint_steps": 16, "optimizer": optimizer}
        job = jobs.make(tmp_path / optimizer, {"hardware": REPLICA, "training": training}, jobs.conversations(28))
        log = jobs.train(job, smoke_model)
        assert job.result.outcome == "completed", log[-3000:]
        ended[optimizer] = job
    fall = {name: job.losses[0] - job.losses[-1] for name, job in ended.items()}
    assert fall["adamw"] > 1
    assert fall["adamw_8bit"] == pytest.approx(fall["adamw"], rel=0.05)
    assert "optimizer 8-bit" in log

    whole = ended["adamw_8bit"]
    again = type(whole)(Path(shutil.copytree(whole.folder, tmp_path / "again")), whole.spec)
    shutil.rmtree(again.folder / "adapter")
    assert "resumes from step-000016" in jobs.train(again, smoke_model, attempt=2)
    assert again.losses == whole.losses
    assert all(
        torch.equal(a, b) for a, b in zip(jobs.tensors(again).values(), jobs.tensors(whole).values(), strict=True)
    )
