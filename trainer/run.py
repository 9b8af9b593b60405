"""One attempt from launch.json to adapter/: load, guard, attach, resume, evaluate, train, export. All ranks walk it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from recipes.catalog import Catalog, Family
from recipes.job import LaunchSpec, Metric
from trainer import checkpoint, export, probe
from trainer.adamw_8bit import AdamW8bit
from trainer.base_files import BaseFiles
from trainer.batches import layout_of, token_count, trained_count
from trainer.data import ChatTokens, Example, proven_fast, read_examples
from trainer.deepspeed_config import deepspeed_config, sizes_of
from trainer.engine import Engine
from trainer.environment import Place, StopRequest, join, leave, quiet_libraries, refuse_slow_kernels
from trainer.experts.module import expert_layers, use_our_experts
from trainer.failures import TrainingStopped
from trainer.first_steps import peak_gib
from trainer.journal import Journal
from trainer.load import DTYPES, refuse_quantised
from trainer.loop import Run, evaluate, train
from trainer.loss import WithLoss
from trainer.packing import can_pack, prove_packing
from trainer.precisions import describe, refuse_surprises
from trainer.replica import Replica
from trainer.rounding import split_share
from trainer.targets import (
    TargetPlan,
    attach,
    base_only,
    lora_config,
    meta_model,
    named_trainable,
    plan_targets,
    table,
    trained_groups,
)
from trainer.zero3 import Zero3


@dataclass(frozen=True)
class Base:
    """The base model's facts, known before a weight is read."""

    files: BaseFiles
    sha256: str
    family: Family
    config: Any

    @property
    def layer_types(self) -> list[str]:
        """The kind of attention of each layer; empty where the family has one kind."""
        return getattr(self.config.get_text_config(), "layer_types", None) or []


def run(spec: LaunchSpec, job: Path, model_folder: Path, catalog: Catalog, journal: Journal, stop: StopRequest) -> bool:
    """Trains and exports; False when SIGTERM ended it after a checkpoint. Raises TrainingStopped and torch's errors."""
    quiet_libraries()
    place = join(os.environ)
    _refuse_wrong_world(spec, place)
    base = _base(spec, model_folder, catalog, place)
    journal.learn(base_sha256=base.sha256, world_size=place.world, versions=_versions())
    chat = ChatTokens(model_folder)
    train_set, valid_set = _data(spec, job, chat, journal)
    plan, engine = _planned(spec, base, place)
    model = _model(spec, base, plan, engine, journal, place)
    resumed = checkpoint.Resumed(job / "checkpoints", checkpoint.fit_key(spec, base.sha256), place.device)
    first_step = _restore_facts(resumed, journal)
    trainable = named_trainable(model)
    if resumed:
        resumed.load_weights(trainable)
    engine.start(WithLoss(model), trainable, lambda matrices: _optimizer(spec, matrices))
    if resumed:
        resumed.load_optimizer(engine)
    layout = layout_of(spec.recipe.training, can_pack(base.layer_types), chat.pad_id)
    work = Run(spec, place, journal, engine, train_set, layout, stop)
    _say_layout(work)
    if first_step == 0:
        _evaluate(work, valid_set, "initial_validation_loss", 0)
    journal.stage("training")
    done = train(work, first_step, lambda step: _save(work, job, base.sha256, step))
    if done:
        _evaluate(work, valid_set, "final_validation_loss", spec.total_steps)
        _finish(work, job, base.family, plan, valid_set)
    leave()
    return done


def _refuse_wrong_world(spec: LaunchSpec, place: Place) -> None:
    if place.world != spec.gpus * spec.nodes:
        raise TrainingStopped(
            "cannot_run_here",
            f"torchrun started {place.world} processes; launch.json says {spec.nodes} nodes x {spec.gpus}",
        )


def _base(spec: LaunchSpec, folder: Path, catalog: Catalog, place: Place) -> Base:
    facts = catalog.models.get(spec.recipe.base.id)
    if facts is None:
        raise TrainingStopped("bad_base_model", f"base.id '{spec.recipe.base.id}' is not in recipes/models.yaml")
    family = catalog.families[facts.family]
    files = BaseFiles(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not config.model_type == spec.model_type == family.model_type:
        raise TrainingStopped(
            "bad_base_model",
            f"{folder} holds a {config.model_type} model; {spec.recipe.base.id} is a {family.model_type}",
        )
    base = Base(files, files.sha256(), family, config)
    refuse_slow_kernels(base.layer_types, place.cuda)
    refuse_quantised(files, spec.recipe)
    return base


def _data(spec: LaunchSpec, job: Path, chat: ChatTokens, journal: Journal) -> tuple[list[Example], list[Example]]:
    """Both sets as tokens."""
    limit, sets, ways = spec.recipe.data.max_tokens, [], []
    for name, sha256, count in (
        ("train.jsonl", spec.train_sha256, spec.train_examples),
        ("valid.jsonl", spec.valid_sha256, spec.valid_examples),
    ):
        path = job / "data" / name
        fast = proven_fast(path, count, chat) if count else None
        sets.append(read_examples(path, sha256, count, chat, limit, fast) if count else [])
        ways.append("fast" if fast else "slow")
    journal.say(
        f"tokenised the {ways[0]} way: {token_count(sets[0]):,} tokens, {trained_count(sets[0]):,} of them trained"
    )
    return sets[0], sets[1]


def _planned(spec: LaunchSpec, base: Base, place: Place) -> tuple[TargetPlan, Engine]:
    """What will be trained and by which engine, before a weight is read."""
    recipe = spec.recipe
    empty = meta_model(base.config, DTYPES[recipe.training.precision])
    held = sum(parameter.numel() for parameter in empty.parameters())
    if held != (spec.base_parameters or held):
        raise TrainingStopped(
            "bad_base_model",
            f"{base.files.folder}: its config.json makes {held:,} parameters; {recipe.base.id} has "
            f"{spec.base_parameters:,} in recipes/models.yaml: stage that model, or mend its row",
        )
    plan = plan_targets(empty, base.family, recipe.adapter)
    if plan.parameters != spec.trainable_parameters:
        raise TrainingStopped(
            "bad_targets", f"{plan.parameters} parameters would train; launch.json says {spec.trainable_parameters}"
        )
    if recipe.hardware.engine == "replica":
        return plan, Replica(recipe.training.gradient_clipping, recipe.hardware.quantize, place)
    return plan, Zero3(deepspeed_config(recipe.training, sizes_of(empty, plan.parameters)), place)


def _model(spec: LaunchSpec, base: Base, plan: TargetPlan, engine: Engine, journal: Journal, place: Place) -> Any:
    """The base as its engine holds it, with its adapter, in training mode."""
    recipe = spec.recipe
    dtype = DTYPES[recipe.training.precision]
    model = engine.load(base.files, base.family, dtype)
    if base.family.our_experts:
        use_our_experts(model)
    attach(
        model,
        base.family,
        recipe.adapter,
        plan,
        seed=recipe.training.seed,
        dtype=dtype,
        summation=engine.summation,
        expert_dtype=engine.expert_dtype,
    )
    model.enable_input_require_grads()  # a block whose input carries no gradient is not gathered for backward
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    refuse_surprises(model, recipe)
    rows = trained_groups(plan)
    journal.learn(trained=rows, trainable_parameters=plan.parameters)
    journal.say(table(rows))
    journal.say(describe(model, recipe.training.optimizer))
    if engine.summation == "split" and "experts" in recipe.adapter.targets and place.rank == 0:
        first = next(base.files.matrices(f"{next(iter(expert_layers(model)))}.gate_up_proj"))
        share = split_share(first, recipe.adapter.rank, dtype)
        journal.say(f"experts: {share:.1%} of an update of 1e-3 of the weights reaches the output in {dtype}")
    return model


def _optimizer(spec: LaunchSpec, matrices: list[Any]) -> Any:
    """The recipe's AdamW over the LoRA matrices."""
    training = spec.recipe.training
    how = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw_8bit":
        return AdamW8bit(matrices, **how)
    return torch.optim.AdamW(matrices, **how, fused=True)


def _say_layout(work: Run) -> None:
    """Proves that what is packed stays apart, or says that nothing is packed. Collective. Raises TrainingStopped."""
    tokens, precision = work.layout.tokens, work.spec.recipe.training.precision
    if tokens is None:
        return
    if not work.layout.packed:
        work.journal.say("packing: none; linear attention without its fast kernels cannot keep conversations apart")
        return
    said = prove_packing(work.engine.model, work.train, tokens, precision, work.place.device)
    work.journal.say(f"packing: up to {tokens:,} tokens a pass; {said}")


def _restore_facts(resumed: checkpoint.Resumed, journal: Journal) -> int:
    """The step to go on from. What earlier attempts learned comes from the checkpoint, not from a memory."""
    if not resumed:
        journal.rewind(-1)
        return 0
    state = resumed.state
    journal.learn(**state["facts"], step=state["step"])
    journal.rewind(state["step"])
    journal.say(f"resumes from {resumed.name}")
    return int(state["step"])


def _save(work: Run, job: Path, base_sha256: str, step: int) -> None:
    names = ("initial_validation_loss", "first_training_loss", "final_training_loss", "trained_tokens")
    state = {
        "fits": checkpoint.fit_key(work.spec, base_sha256),
        "saved_by_world_size": work.place.world,
        "facts": {name: work.journal.known(name) for name in names} | {"earlier_seconds": work.journal.seconds()},
    }
    checkpoint.save(job / "checkpoints", step, work.engine, state, keeper=work.place.rank == 0)


def _evaluate(work: Run, valid_set: list[Example], fact: str, step: int) -> None:
    """The loss on the held-out conversations, as a fact of the result and a line of metrics.jsonl."""
    if not valid_set:
        return
    work.journal.stage("evaluating")
    loss = evaluate(work.engine.model, valid_set, work.layout, work.place)
    if not loss < float("inf"):
        raise TrainingStopped("nan_loss", f"the loss on the held-out conversations is {loss} at step {step}")
    work.journal.learn(**{fact: loss})
    now = work.journal.now()
    epoch = -(-step // work.spec.steps_per_epoch)
    work.journal.record(
        Metric(kind="eval", at=now, attempt=work.journal.attempt, epoch=epoch, step=step, validation_loss=loss)
    )


def _finish(work: Run, job: Path, family: Family, plan: TargetPlan, valid_set: list[Example]) -> None:
    """Probe and adapter. Refuses a training that changed nothing (no_effect) before an adapter exists."""
    work.journal.stage("saving")
    model, device = work.engine.model, work.place.device
    model.eval()
    conversations = probe.choose(work.train, valid_set)
    trained = probe.log_probabilities(model, conversations, device)
    with base_only(model):
        base = probe.log_probabilities(model, conversations, device)
    effect, floor = probe.rms(base, trained), probe.EFFECT_FLOOR[work.spec.recipe.training.precision]
    if not effect > floor:
        raise TrainingStopped(
            "no_effect", f"the adapter moves log-probabilities by {effect:.1e}; {floor:.0e} is rounding"
        )
    weights = checkpoint.full_weights(work.engine, keeper=work.place.rank == 0)
    if work.place.rank == 0:
        probe.write_probe(job / "probe.safetensors", conversations, base, trained)
        config = lora_config(family, work.spec.recipe.adapter)
        sums = export.write_adapter(job / "adapter", config, work.spec.recipe.base, weights, plan)
        work.journal.learn(adapter_sha256=sums)
    work.journal.learn(peak_gib=peak_gib(work.place))


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "deepspeed", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
