"""Trains the adapter of one job folder: reads launch.json and data/, writes status, metrics, checkpoints and adapter/.

torchrun --nnodes 1 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port PORT -m trainer.train \\
    --job DIR --model DIR --attempt 1

Give every start a free port and no restarts of torchrun's own: they hang on gloo. On a machine without GPUs set
DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false; on GPUs TOKENIZERS_PARALLELISM=false alone.
SIGTERM to torchrun saves a checkpoint and ends; torchrun then returns 1 whatever its ranks return, so read result.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from recipes.causes import EXIT_CODES, Cause
from recipes.errors import LorryError
from recipes.job import LaunchSpec, read_record
from trainer.environment import StopRequest, die_with_parent, refuse_unresolved_secrets
from trainer.failures import explain
from trainer.journal import Journal


def main() -> int:
    """Exit code 0, or recipes.causes.EXIT_CODES of the cause in result.json."""
    die_with_parent()
    stop = StopRequest()
    stop.listen()
    arguments = _arguments()
    try:
        spec = read_record(LaunchSpec, arguments.job / "launch.json")
    except LorryError as error:
        print(error, file=sys.stderr)
        return EXIT_CODES["bad_data"]
    if spec is None:
        print(f"{arguments.job}: no launch.json", file=sys.stderr)
        return EXIT_CODES["bad_data"]
    journal = Journal(arguments.job, spec, arguments.attempt, keeper=os.environ["RANK"] == "0")
    cause, sentence = _train(spec, arguments, journal, stop)
    try:
        code = journal.close(cause, sentence)
    except OSError as error:
        cause, sentence = cause or "disk_full", f"{sentence} (result.json cannot be written: {error})"
        code = EXIT_CODES[cause]
    if cause:
        print(f"{cause}: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # after a failure the communication threads of torch may never end
    return code


def _train(
    spec: LaunchSpec, arguments: argparse.Namespace, journal: Journal, stop: StopRequest
) -> tuple[Cause | None, str]:
    # Micro-batches of many sizes leave holes in a GPU's memory that no later one fits; torch reads this when imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the trainer knows no network: what is not staged is missing
    try:
        journal.open()
        refuse_unresolved_secrets(os.environ)
        from recipes.catalog import load_catalog
        from trainer.run import run

        if run(spec, arguments.job, arguments.model, load_catalog(), journal, stop):
            return None, ""
        return "cancelled", f"stopped on request after step {journal.known('step') or 0} of {spec.total_steps}"
    except Exception as error:
        cause, sentence = explain(error)
        if cause in ("unexpected", "lost_rank"):
            traceback.print_exc()
        return cause, sentence


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the adapter of one job folder. Start it with torchrun.")
    parser.add_argument("--job", type=Path, required=True, help="the job folder")
    parser.add_argument("--model", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--attempt", type=int, required=True, help="1 for the first start, 2 for the next")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
