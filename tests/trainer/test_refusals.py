"""What ends a training early: the cause, the sentence, and result.json, each from the real thing going wrong.

Runs of one rank inside this process: a failed run never leaves the process group, so the next one finds it.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from recipes.catalog import load_catalog
from recipes.causes import EXIT_CODES
from recipes.job import Result, read_record, write_record
from trainer import environment, load, loop
from trainer.base_files import BaseFiles, loading
from trainer.data import ChatTokens
from trainer.deepspeed_config import Sizes, deepspeed_config
from trainer.environment import StopRequest, refuse_slow_kernels, refuse_unresolved_secrets
from trainer.failures import TrainingStopped, explain
from trainer.journal import Journal
from trainer.quantize import quantise
from trainer.run import run

ONE_RANK = {"hardware": {"gpus": 1}, "training": {"max_steps": 3, "micro_batch": 2}}

LOADING = loading(load_catalog().families["qwen3_next"])


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """The environment torchrun gives to a single rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        environment.join(os.environ)
        yield


@pytest.fixture
def base(smoke_model: Path, tmp_path: Path) -> Path:
    """A copy of the smoke model that may be damaged."""
    return Path(shutil.copytree(smoke_model, tmp_path / "base"))


def attempt(job: Any, model: Path) -> Result:
    """What trainer.train does with a job, in this process, up to its result."""
    journal = Journal(job.folder, job.spec, 1, keeper=True)
    journal.open()
    try:
        run(job.spec, job.folder, model, load_catalog(), journal, StopRequest())
    except Exception as error:
        journal.close(*explain(error))
        gc.collect()  # the engine's hooks hold the model in a circle
    found = read_record(Result, job.folder / "result.json")
    assert found is not None
    assert found.exit_code == EXIT_CODES[found.cause]
    assert not (job.folder / "adapter").exists()
    return found


def relaunch(job: Any, **fields: Any) -> Any:
    """The job with other values in launch.json."""
    spec = job.spec.model_copy(update=fields)
    write_record(job.folder / "launch.json", spec)
    return type(job)(job.folder, spec)


@pytest.mark.parametrize(
    ("fields", "cause", "sentence"),
    [
        (
            {"deadline_seconds": 0, "expected_step_seconds": 0.5},
            "too_slow",
            r"planned 0\.50 s\).*the 2 steps left take",
        ),
        ({"capacity_gib": 0.01}, "out_of_memory", r"peak \d+\.\d\d GiB \(not planned\) of 0\.01; lower"),
    ],
)
def test_a_run_that_would_miss_its_deadline_or_its_memory_ends_after_three_steps(
    fields: dict[str, Any], cause: str, sentence: str, jobs: Any, smoke_model: Path, tmp_path: Path
) -> None:
    changes = {"hardware": {"gpus": 1}, "training": {"max_steps": 5, "micro_batch": 2}}
    job = relaunch(jobs.make(tmp_path / "job", changes, jobs.conversations(12)), **fields)
    result = attempt(job, smoke_model)
    assert (result.cause, result.step) == (cause, 3)
    assert re.search(sentence, result.sentence)
    assert result.step_seconds > 0
    assert result.peak_gib > 0.1


def test_another_number_of_processes_than_launched_is_refused(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    result = attempt(jobs.make(tmp_path / "job", {}, jobs.conversations(8)), smoke_model)
    assert result.sentence == "torchrun started 1 processes; launch.json says 1 nodes x 2"


def test_a_count_the_planner_did_not_make_is_refused(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    job = relaunch(jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8)), trainable_parameters=79_871)
    result = attempt(job, smoke_model)
    assert (result.cause, result.sentence) == ("bad_targets", "79872 parameters would train; launch.json says 79871")


def test_a_base_of_another_size_than_its_row_is_refused(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    job = relaunch(jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8)), base_parameters=79_674_391_296)
    result = attempt(job, smoke_model)
    assert result.cause == "bad_base_model"
    assert "makes 343,976 parameters; lorry/smoke has 79,674,391,296 in recipes/models.yaml" in result.sentence


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("fp8", {"hardware": {"gpus": 1, "engine": "replica"}}, "experts cannot be trained; take experts out of"),
        ("fp8", {"adapter": {"targets": ("attention",)}}, "say engine replica and quantize null"),
        ("mxfp4", {}, "make bf16 of it with `python -m trainer.quantize --kind bf16`, and stage that folder"),
        ("awq", {}, "(awq), which is not read here; stage the bf16 checkpoint instead"),
    ],
)
def test_a_published_quantised_base_is_refused_with_the_way_out(
    method: str, changes: dict[str, Any], sentence: str, jobs: Any, base: Path, tmp_path: Path
) -> None:
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    job = jobs.make(tmp_path / "job", ONE_RANK | changes, jobs.conversations(8))
    result = attempt(relaunch(job, gpus=1), base)
    assert result.cause == "bad_base_model"
    assert sentence in result.sentence


def test_a_staged_file_that_went_bad_is_found_as_zero3_reads_it(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    record = quantise(smoke_model, staged, "bf16", model="lorry/smoke", revision=None, say=lambda done, total: None)
    last = staged / list(record.files)[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"\x99")
    result = attempt(jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8)), staged)
    assert result.cause == "bad_base_model"
    assert "its checksum differs from staged's record" in result.sentence


def test_another_model_class_and_changed_data_are_refused(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    job = jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8))
    assert attempt(relaunch(job, model_type="mistral"), smoke_model).cause == "bad_base_model"
    assert attempt(relaunch(job, train_sha256="0" * 64), smoke_model).cause == "bad_data"
    assert "is missing" in attempt(job, tmp_path / "nowhere").sentence or "no config.json" in job.result.sentence


def test_a_base_with_a_missing_tensor_is_refused(jobs: Any, base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = attempt(jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8)), base)
    assert result.cause == "bad_base_model"
    assert "does not load: Failed to apply weight conversion" in result.sentence


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(jobs: Any, base: Path, tmp_path: Path) -> None:
    """An infinite embedding of one token that only one training row uses: the held-out rows do not see it."""
    chat = ChatTokens(base)
    rows = jobs.conversations(8)
    rows[0]["messages"][-2]["content"] += " #"
    (poison,) = set(chat.encode("#")[0])
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][poison] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = attempt(jobs.make(tmp_path / "job", ONE_RANK, rows), base)
    assert (result.cause, result.exit_code, result.step) == ("nan_loss", 21, 0)
    assert result.sentence == "the loss of step 1 is nan; lower training.learning_rate"
    assert result.initial_validation_loss == pytest.approx(6.0, abs=0.1)


def test_nan_in_the_loss_or_the_gradient_is_named_with_its_step() -> None:
    for loss, norm, name in ((float("nan"), 1.0, "loss"), (1.0, float("inf"), "gradient norm")):
        with pytest.raises(TrainingStopped, match=rf"the {name} of step 7 is (nan|inf); lower training\.learning_rate"):
            loop._refuse_nan(7, loss, norm)


def test_a_training_that_changes_nothing_has_no_adapter(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    changes = {"hardware": {"gpus": 1}, "training": {"max_steps": 2, "learning_rate": 1e-12}}
    result = attempt(jobs.make(tmp_path / "job", changes, jobs.conversations(8)), smoke_model)
    assert result.cause == "no_effect"
    assert result.sentence.endswith("1e-04 is rounding")
    assert result.step == 2


def test_a_full_disk_is_called_a_full_disk(jobs: Any, smoke_model: Path, tmp_path: Path) -> None:
    job = jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8))
    (job.folder / "metrics.jsonl").symlink_to("/dev/full")
    result = attempt(job, smoke_model)
    assert (result.cause, result.exit_code) == ("disk_full", 23)
    assert result.sentence.startswith("the disk is full; take an offer with more disk, or free some space (OSError")


def test_a_matrix_without_gradient_is_refused_after_its_step(
    jobs: Any, smoke_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared expert is cut out of the forward pass, so its matrices get no gradient."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    class Silent(modeling.Qwen3NextMLP):
        def forward(self, x: Any) -> Any:
            return super().forward(x).detach()

    monkeypatch.setattr(modeling, "Qwen3NextMLP", Silent)
    result = attempt(jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8)), smoke_model)
    assert result.cause == "bad_targets"
    assert "shared_expert" in result.sentence
    assert result.sentence.endswith("got no gradient by step 1 (12 such matrices)")


def test_checkpointing_that_is_silently_off_in_eval_mode_is_refused(
    jobs: Any, smoke_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """from_pretrained returns eval mode, and nothing but .train() ends it."""
    real = torch.nn.Module.train
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: real(self, False))
    result = attempt(jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8)), smoke_model)
    assert result.sentence == "gradient checkpointing is off: layers are not recomputed in backward"


def test_a_model_that_every_rank_holds_whole_is_refused(smoke_model: Path, jobs: Any) -> None:
    """transformers holds HfDeepSpeedConfig weakly: once it is dropped nothing is partitioned, without a word."""
    training = jobs.changed(recipe(), {}).training
    config = deepspeed_config(training, Sizes(100_000, 30_000))
    holder = HfDeepSpeedConfig(config)
    model, _ = AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **LOADING)
    load.refuse_unpartitioned(model)
    load.probe_weights(model, BaseFiles(smoke_model))
    load.refuse_gathered(model)
    del holder
    HfDeepSpeedConfig(config)
    whole, _ = AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **LOADING)
    with pytest.raises(TrainingStopped, match="is not partitioned: HfDeepSpeedConfig was not alive at loading"):
        load.refuse_unpartitioned(whole)


def test_eager_experts_are_refused(smoke_model: Path) -> None:
    eager = LOADING | {"experts_implementation": "eager"}
    model, _ = AutoModelForCausalLM.from_pretrained(smoke_model, dtype=torch.float32, **eager)
    with pytest.raises(TrainingStopped, match="eager experts hang under ZeRO-3"):
        load.refuse_eager(model.config)
    assert LOADING["experts_implementation"] == "grouped_mm"


def test_real_errors_get_their_cause() -> None:
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(2**60)
    causes = {
        "out_of_memory": [too_much.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")],
        "disk_full": [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded")],
        "lost_rank": [
            RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
            torch.distributed.DistBackendError("NCCL error: remote process exited"),
        ],
        "cannot_run_here": [ModuleNotFoundError("No module named 'deepspeed'")],
        "unexpected": [ZeroDivisionError("division by zero"), KeyError("x")],
    }
    for cause, errors in causes.items():
        for error in errors:
            assert explain(error)[0] == cause, error
    assert explain(ZeroDivisionError("division by zero"))[1] == "ZeroDivisionError: division by zero"


def test_an_unresolved_secret_template_is_refused() -> None:
    refuse_unresolved_secrets({"LORRY_STORE": "s3://bucket/x", "PS1": "{{ prompt }}"})
    for name in ("LORRY_STORE", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        with pytest.raises(
            TrainingStopped, match=rf"environment variable {name} holds an unresolved \{{\{{ \}}\}} template"
        ):
            refuse_unresolved_secrets({name: "{{ RUNPOD_SECRET_x }}"})


def test_slow_kernels_are_refused_on_gpus_only() -> None:
    refuse_slow_kernels(["linear_attention", "full_attention"], cuda=False)
    refuse_slow_kernels(["full_attention"], cuda=True)
    with pytest.raises(TrainingStopped, match="the image lacks fla and causal_conv1d"):
        refuse_slow_kernels(["linear_attention", "full_attention"], cuda=True)


def test_a_rank_without_torchrun_or_with_a_broken_launch_file_says_so(
    jobs: Any, smoke_model: Path, tmp_path: Path
) -> None:
    arguments = ["--job", str(tmp_path), "--model", str(smoke_model), "--attempt", "1"]
    command = [sys.executable, "-m", "trainer.train", *arguments]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert alone.returncode == 1
    assert alone.stderr == "trainer.train: not started by torchrun; start it as `torchrun ... -m trainer.train`\n"
    job = jobs.make(tmp_path / "job", ONE_RANK, jobs.conversations(8))
    (job.folder / "launch.json").write_text(json.dumps({"job_id": "x"}), encoding="utf-8")
    log = jobs.train(job, smoke_model)
    assert "not a LaunchSpec file" in log
    assert "Traceback" not in log.split("torch/distributed")[0]


def test_the_heartbeat_starts_before_torch_is_imported() -> None:
    code = "import sys, trainer.train, trainer.smoke_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=280, check=False).returncode == 0


def test_sigterm_is_only_noted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    stop.listen()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    finally:
        signal.signal(signal.SIGTERM, before)


def recipe() -> Any:
    from recipes.load import load_recipe

    return load_recipe("smoke/zero3").recipe
