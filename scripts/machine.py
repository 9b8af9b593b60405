"""The machine a container runs on: where things lie, how the trainer is started, what it sees of the environment."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from scripts.container.gpu_probe import Probe, gpus_busy
from scripts.container.nodes import ALONE, Node, network_variables, node_of
from scripts.container.supervisor import Timing
from scripts.store import Store

ROOT = Path(__file__).parent.parent
"Where the packages lie: the trainer is started from here, installed or not."

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "FI_", "TORCH_", "TRITON_")  # FI_: Amazon's network
_FIXED = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",  # the trainer knows no network
}
_UNKNOWN_GB_PER_SECOND = 0.2  # a slow network volume


@dataclass(frozen=True)
class Run:
    """One start of the trainer or the prover: the job folder, the base model's folder, what to train, which attempt,
    and on which node."""

    job: Path
    model: Path
    spec: LaunchSpec
    attempt: int
    grace: float
    node: Node = ALONE


Command = Callable[[Run], list[str]]


def torchrun_command(run: Run) -> list[str]:
    """One attempt: a new torchrun, which never restarts anything by itself."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", *run.node.words(run.attempt)),
        *("--nproc_per_node", str(run.spec.gpus), "--max-restarts", "0"),
        *("--shutdown-timeout", str(max(1, int(run.grace)))),  # its own 30 s may be shorter than a checkpoint
        *("-m", "trainer.train", "--job", str(run.job), "--model", str(run.model), "--attempt", str(run.attempt)),
    ]


def prover_command(run: Run) -> list[str]:
    """The prover: a fresh process that loads the base model and the adapter."""
    return [sys.executable, "-m", "trainer.prove", "--job", str(run.job), "--model", str(run.model)]


def nothing() -> None:
    """The end of a machine that is not ours to end."""


@dataclass(frozen=True)
class Machine:
    """What a container stands on. `end` ends the machine itself: nothing to do on this one, a Pod on Runpod."""

    store: Store
    job_id: str
    work: Path
    "The job folder itself where the store is this disk, else a folder for its copy."
    models: Path
    environment: Mapping[str, str]
    timing: Timing = field(default_factory=Timing)
    train: Command = torchrun_command
    prove: Command = prover_command
    end: Callable[[], None] = nothing
    gpus_busy: Probe = gpus_busy

    @property
    def node(self) -> Node:
        """Which node of the job this is. Raises InputError."""
        return node_of(self.environment)

    @property
    def models_from(self) -> str:
        """URL of the models folder that is copied to `models` first; empty where that is filled already."""
        return self.environment.get("LORRY_MODELS_FROM", "")

    @property
    def ends_at(self) -> float:
        """When anybody may end this machine, in seconds since 1970: LORRY_DEADLINE, which a rented one has."""
        text = self.environment.get("LORRY_DEADLINE", "")
        return float(text) if text.isdecimal() else math.inf


def trainer_environment(environment: Mapping[str, str], on_cpu: bool) -> dict[str, str]:
    """What the trainer sees: names that are known to be harmless, so no cloud key ever reaches it."""
    seen = {k: v for k, v in environment.items() if k in _PASSED_ON or k.startswith(_PASSED_ON_PREFIXES)}
    path = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    return {**seen, **network_variables(environment), **_FIXED, **cpu, "PYTHONPATH": ":".join(path)}


def trains_on_cpu(spec: LaunchSpec) -> bool:
    """Whether the offer is CPU processes. The smoke model, or a job without an offer, makes do with what there is."""
    catalog = load_catalog()
    offer, model = catalog.offers.get(spec.offer or ""), catalog.models.get(spec.recipe.base.id)
    if offer is not None and (offer.gpu == "cpu" or model is None or model.staged):
        return offer.gpu == "cpu"
    return not Path("/dev/nvidiactl").exists()


def loading_seconds(spec: LaunchSpec) -> float:
    """How long loading the base model may be silent: three times its bytes over the offer's reading speed."""
    catalog = load_catalog()
    model, offer = catalog.models.get(spec.recipe.base.id), catalog.offers.get(spec.offer or "")
    speed = offer.storage_gb_per_second if offer else _UNKNOWN_GB_PER_SECOND
    return 3 * model.checkpoint_gb / speed if model else 0.0
