"""The process around the training: dies with its launcher, hears SIGTERM, joins the other ranks, knows its device."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.failures import TrainingStopped

# Longer than any single collective of a run: the slowest is waiting for rank 0 to read a large checkpoint.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
SECRET_LIKE = re.compile(r"^LORRY_|KEY|TOKEN|SECRET|PASSWORD")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank of `world`, and the torch device it computes on."""

    rank: int
    world: int
    device: Any
    cuda: bool


class StopRequest:
    """Set by SIGTERM. The loop reads it at step boundaries, where all ranks agree on it."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Installs the handler."""
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def die_with_parent() -> None:
    """Makes the kernel kill this process when torchrun dies: `kill -9` of it would leave ranks running and billing."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # torchrun may have died before the line above; then the parent is somebody else, who would never kill us.
    if b"torch" not in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
        sys.exit("trainer.train: not started by torchrun; start it as `torchrun ... -m trainer.train`")


def refuse_unresolved_secrets(environment: Mapping[str, str]) -> None:
    """A provider that does not know a secret hands the template through as text. Raises TrainingStopped."""
    names = sorted(n for n, value in environment.items() if SECRET_LIKE.search(n) and "{{" in value)
    if names:
        raise TrainingStopped(
            "cannot_run_here", f"environment variable {names[0]} holds an unresolved {{{{ }}}} template"
        )


def join(environment: Mapping[str, str]) -> Place:
    """Joins the process group: NCCL on GPUs, gloo without. Raises TrainingStopped when the machine lacks GPUs."""
    import deepspeed
    import torch

    rank, world, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available() and environment.get("DS_ACCELERATOR") != "cpu"
    if cuda and local >= torch.cuda.device_count():
        raise TrainingStopped(
            "cannot_run_here", f"rank {rank} has no GPU of its own: the machine shows {torch.cuda.device_count()}"
        )
    if cuda:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
        # Else the first start compiles C++ for minutes, and fails where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return Place(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"), cuda)


def quiet_libraries() -> None:
    """Progress bars and notices of the libraries drown our lines; their errors stay."""
    from deepspeed.utils import logger as deepspeed_logger
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def leave() -> None:
    """Waits for the other ranks and leaves the group; ranks that just exit may abort after the last step."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def refuse_slow_kernels(layer_types: list[str], cuda: bool) -> None:
    """On GPUs the torch fallback of linear attention is many times slower. Raises TrainingStopped."""
    missing = [name for name in ("fla", "causal_conv1d") if importlib.util.find_spec(name) is None]
    if cuda and missing and "linear_attention" in layer_types:
        raise TrainingStopped(
            "cannot_run_here", f"the image lacks {' and '.join(missing)}, which this model's linear attention needs"
        )
