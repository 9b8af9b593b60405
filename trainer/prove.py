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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.catalog import load_catalog
from recipes.causes import EXIT_CODES
from recipes.job import LaunchSpec, Proof, Result, read_record, write_record
from trainer import probe
from trainer.adapter import load_adapter, quiet_transformers
from trainer.base_files import BaseFiles, file_sha256
from trainer.evaluate import measure
from trainer.export import CONFIG, WEIGHTS
from trainer.failures import TrainingStopped, explain
from trainer.targets import base_only


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
