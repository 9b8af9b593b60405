"""Where a job can run: one file per backend, all with the protocol of base.py.

backend = open_backend("local", os.environ)
"""

from __future__ import annotations

from collections.abc import Mapping

from recipes.recipe import BackendName
from scripts.backends.base import Backend
from scripts.errors import Problem, Refused

LAUNCHABLE: tuple[BackendName, ...] = ("local", "runpod_pod", "runpod_queue", "sagemaker", "ec2")

RENTS: dict[BackendName, str] = {
    "runpod_pod": "RUNPOD_API_KEY",
    "runpod_queue": "RUNPOD_API_KEY",
    "sagemaker": "LORRY_SAGEMAKER_ROLE",
    "ec2": "LORRY_EC2_TEMPLATE",
}
"Backends that cost money -> the setting without which nothing is rented there."


def rented(environment: Mapping[str, str]) -> tuple[BackendName, ...]:
    """Where this environment may rent machines. Runpod where it says nothing, so that the missing key is named."""
    return tuple(name for name, variable in RENTS.items() if environment.get(variable)) or ("runpod_pod",)


def open_backend(name: BackendName, environment: Mapping[str, str]) -> Backend:
    """The backend of that name; its SDK is imported here and nowhere else. Raises Refused where it cannot launch."""
    if name == "local":
        from scripts.backends.local import LocalBackend

        return LocalBackend(environment)
    if name == "runpod_pod":
        from scripts.backends.runpod_pod import RunpodPodBackend

        return RunpodPodBackend(environment)
    if name == "runpod_queue":
        from scripts.backends.runpod_queue import RunpodQueueBackend

        return RunpodQueueBackend(environment)
    if name == "sagemaker":
        from scripts.backends.sagemaker import SageMakerBackend

        return SageMakerBackend(environment)
    if name == "ec2":
        from scripts.backends.ec2 import Ec2Backend

        return Ec2Backend(environment)
    launchable = ", ".join(LAUNCHABLE)
    raise Refused(
        Problem(f"backend {name}", "this version plans and renders for it but cannot launch on it", launchable)
    )
