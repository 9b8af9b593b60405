"""Proves an adapter in a fresh process: from its file alone the trained model's answers must come again.

Plain transformers and PEFT read it wherever they compute as the training did. They do not in two cases: PEFT cannot
reach quantised experts, and in bf16 it folds an expert's LoRA into rounded weights, which loses about half of a small
update. There our own modules read the same file, on the same base, in the training's arithmetic.

python -m trainer.prove --job DIR --model DIR     # reads adapter/, probe.safetensors, result.json; writes proof.json

A proved adapter is also measured, since the model is in memory: scores.json, from which `lorry evaluate` concludes.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from recipes.catalog import Family, load_catalog
from recipes.causes import EXIT_CODES
from recipes.job import LaunchSpec, Proof, Result, read_record, write_record
from recipes.recipe import Recipe
from trainer import probe
from trainer.base_files import BaseFiles, file_sha256, loading, refuse_incomplete
from trainer.evaluate import measure
from trainer.experts.module import use_our_experts
from trainer.experts.projection import Summation
from trainer.export import CONFIG, WEIGHTS, file_tensors, read_adapter
from trainer.failures import TrainingStopped, explain
from trainer.load import DTYPES, load_whole
from trainer.targets import attach, base_only, meta_model, named_trainable, plan_targets


@dataclass(frozen=True)
class Proven:
    """A proof, with the model it was made on and what the job says of it."""

    proof: Proof
    model: Any
    spec: LaunchSpec
    result: Result


def prove(job: Path, model_folder: Path) -> Proven:
    """The proof of job/adapter. Raises TrainingStopped: bad_base_model (another base), no_effect (a bad adapter)."""
    started = time.monotonic()
    quiet_transformers()
    spec, result = read_record(LaunchSpec, job / "launch.json"), read_record(Result, job / "result.json")
    if spec is None or result is None or result.outcome != "completed":
        raise TrainingStopped("no_effect", f"{job}: no finished training to prove")
    sums = _refuse_changed_files(job / "adapter", result.adapter_sha256)
    if BaseFiles(model_folder).sha256() != result.base_sha256:
        raise TrainingStopped("bad_base_model", f"{model_folder}: not the base model the adapter was trained on")
    precision = spec.recipe.training.precision
    conversations, base_said, trained_said = probe.read_probe(job / "probe.safetensors")
    catalog = load_catalog()
    family = catalog.families[catalog.models[spec.recipe.base.id].family]
    model, consumed = load_adapter(model_folder, job / "adapter", family, spec.recipe)
    device = next(model.parameters()).device
    again = probe.log_probabilities(model, conversations, device)
    with base_only(model):
        base_again = probe.log_probabilities(model, conversations, device)
    effect = probe.rms(base_said, trained_said)
    error = probe.rms(trained_said, again)
    refuse_unfaithful(precision, effect, error, probe.rms(base_said, base_again))
    proof = Proof(
        job_id=spec.job_id,
        passed=True,
        sentence=f"a fresh process reproduces the trained model: error {error:.1e}, effect {effect:.3f}",
        adapter_sha256=sums,
        tensors=consumed,
        tensors_consumed=consumed,
        effect=effect,
        reproduction_error=error,
        positions=sum(len(positions) for _, positions in conversations),
        seconds=time.monotonic() - started,
    )
    return Proven(proof, model, spec, result)


def load_adapter(model_folder: Path, adapter: Path, family: Family, recipe: Recipe) -> tuple[Any, int]:
    """(the model with the adapter in eval mode, tensors of the file that it took up: all). Raises TrainingStopped."""
    experts_in_bf16 = "experts" in recipe.adapter.targets and recipe.training.precision == "bf16"
    if recipe.hardware.quantize or experts_in_bf16:
        return _with_our_modules(model_folder, adapter, family, recipe)
    model, consumed = _with_peft(model_folder, adapter, family, DTYPES[recipe.training.precision])
    if family.moe_block and recipe.training.precision == "bf16":
        use_our_experts(model)  # rounded as in training, or near-ties in the routers fall otherwise
    return model, consumed


def _with_peft(model_folder: Path, adapter: Path, family: Family, dtype: torch.dtype) -> tuple[Any, int]:
    model, info = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=dtype,
        device_map="auto" if torch.cuda.is_available() else None,
        **loading(family),
    )
    refuse_incomplete(info)
    try:
        peft_model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    except (SafetensorError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise TrainingStopped("no_effect", f"PEFT cannot load the adapter: {error}".splitlines()[0]) from error
    return peft_model.eval(), consumed_tensors(peft_model, adapter / WEIGHTS)


def _with_our_modules(model_folder: Path, adapter: Path, family: Family, recipe: Recipe) -> tuple[Any, int]:
    """The adapter attached as in training and filled from the file."""
    dtype = DTYPES[recipe.training.precision]
    device = "auto" if torch.cuda.is_available() and not recipe.hardware.quantize else _one_device()
    model = load_whole(BaseFiles(model_folder), family, dtype, device, recipe.hardware.quantize)
    plan = plan_targets(meta_model(model.config, dtype), family, recipe.adapter)
    summation: Summation = "accumulator" if recipe.hardware.engine == "replica" else "split"
    attach(model, family, recipe.adapter, plan, seed=0, dtype=dtype, summation=summation)
    if family.moe_block:
        use_our_experts(model)
    try:
        weights = read_adapter(adapter / WEIGHTS, plan)
    except (SafetensorError, ValueError) as error:
        raise TrainingStopped("no_effect", f"the adapter cannot be loaded: {error}".splitlines()[0]) from error
    with torch.no_grad():
        for name, parameter in named_trainable(model).items():
            parameter.copy_(weights[name])
    return model.eval(), len(file_tensors(weights))


def _one_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def consumed_tensors(peft_model: Any, path: Path) -> int:
    """How many tensors the file holds, each proven to be in the model. PEFT only warns about keys it cannot place."""
    inside = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    with safe_open(path, "pt") as file:
        strange = sorted(set(file.keys()) ^ set(inside))
        if strange:
            raise TrainingStopped(
                "no_effect", f"{len(strange)} adapter tensors have no counterpart, first {strange[0]}"
            )
        for key, tensor in inside.items():
            if not torch.equal(tensor.cpu(), file.get_tensor(key).to(tensor.dtype)):
                raise TrainingStopped("no_effect", f"{key} was not loaded from the file")
    return len(inside)


def refuse_unfaithful(precision: str, effect: float, error: float, base_error: float) -> None:
    """Refuses an adapter that changes nothing, a base that is another one, and an adapter that says something else."""
    floor, limit = probe.EFFECT_FLOOR[precision], probe.REPRODUCTION_LIMIT[precision]
    if not effect > floor:
        raise TrainingStopped("no_effect", f"the adapter changes nothing: effect {effect:.1e}, rounding is {floor:.0e}")
    if not base_error <= limit * effect:
        raise TrainingStopped(
            "bad_base_model", f"the base model says something else than in training: {base_error:.1e}"
        )
    if not error <= limit * effect:
        raise TrainingStopped(
            "no_effect",
            f"the reloaded adapter does not say what the trained model said: error {error:.1e}, effect {effect:.1e}",
        )


def main() -> int:
    """Exit code 0, or EXIT_CODES of no_effect or bad_base_model; proof.json in both cases."""
    parser = argparse.ArgumentParser(description="Proves the adapter of a job folder in a fresh process.")
    parser.add_argument("--job", type=Path, required=True, help="the job folder")
    parser.add_argument("--model", type=Path, required=True, help="the base model's folder")
    arguments = parser.parse_args()
    try:
        proven = prove(arguments.job, arguments.model)
    except Exception as error:
        cause, sentence = explain(error)
        write_record(arguments.job / "proof.json", _failed(arguments.job, sentence))
        print(sentence, flush=True)
        return EXIT_CODES[cause]
    write_record(arguments.job / "proof.json", proven.proof)
    print(proven.proof.sentence, flush=True)
    _measure(proven, arguments.job, arguments.model)
    return 0


def _measure(proven: Proven, job: Path, model_folder: Path) -> None:
    """Writes scores.json. The adapter is proved whatever happens here; what is missing can be measured later."""
    try:
        scores = measure(proven.model, job, model_folder, proven.spec, proven.result)
        write_record(job / "scores.json", scores)
        print(
            f"measured on {len(scores.held_out)} conversations and {len(scores.general)} general questions", flush=True
        )
    except Exception as error:
        print(f"not measured: {explain(error)[1]}", flush=True)


def quiet_transformers() -> None:
    """No progress bars and no advice in the log."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _refuse_changed_files(adapter: Path, proven: dict[str, str]) -> dict[str, str]:
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise TrainingStopped("no_effect", f"adapter/{name} is missing")
    sums = {name: file_sha256(adapter / name) for name in (CONFIG, WEIGHTS)}
    for name, value in sums.items():
        if proven.get(name) != value:
            raise TrainingStopped("no_effect", f"adapter/{name} is not the file the trainer wrote")
    return sums


def _failed(job: Path, sentence: str) -> Proof:
    spec = read_record(LaunchSpec, job / "launch.json")
    return Proof(
        job_id=spec.job_id if spec else "",
        passed=False,
        sentence=sentence,
        adapter_sha256={},
        tensors=0,
        tensors_consumed=0,
        effect=0.0,
        reproduction_error=0.0,
        positions=0,
        seconds=0.0,
    )


if __name__ == "__main__":
    sys.exit(main())
