"""Why a machine may not be there any longer although its job is over: what every stop from outside asks. Pure.

overstay(files, now=time.time())     # "its job was stopped 9 minutes ago (cap)"
"""

from __future__ import annotations

from scripts.job_folder import JobFiles

STOPPED_SECONDS = 120.0
"After a stop: the trainer saves a checkpoint (60 s of grace) and the container brings it home."
ENDED_SECONDS = 1200.0
"After the end: the container has 900 s to bring logs and checkpoints home, and then ends its machine."
SPOKEN_SECONDS = 300.0
"After the container's last word, which it says when all is home: its next act is to end its machine."


def ended_at(files: JobFiles) -> float | None:
    """When the job itself was over: its adapter whole, or its last attempt done; None while it is not.

    Not the container's last word, which a machine that cannot end itself goes on to say.
    """
    container = files.container
    if files.manifest is not None:
        return files.manifest.created_at
    if container is None or container.ended is None:
        return None
    last = container.attempts[-1].ended_at if container.attempts else None
    return last or container.updated_at


def overstay(files: JobFiles, now: float) -> str | None:
    """A sentence when the job's machine must go now; None while it may stay."""
    over = ended_at(files)
    if over is not None and now - over > ENDED_SECONDS:
        return f"its job ended {(now - over) / 60:.0f} minutes ago"
    container = files.container
    if container is not None and container.ended is not None and now - container.updated_at > SPOKEN_SECONDS:
        return f"its job ended, and its machine has said nothing for {(now - container.updated_at) / 60:.0f} minutes"
    if files.stop is not None and now - files.stop.at > STOPPED_SECONDS:
        return f"its job was stopped {(now - files.stop.at) / 60:.0f} minutes ago ({files.stop.by})"
    return None
