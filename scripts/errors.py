"""The branches of the error tree that verbs raise; the base is `recipes.errors.LorryError`."""

from __future__ import annotations

from recipes.errors import InputError, LorryError, Problem

__all__ = [
    "Conflict",
    "InputError",
    "LorryError",
    "NotFound",
    "Problem",
    "ProviderError",
    "Refused",
    "TrainingFailed",
    "VerificationFailed",
]


class Refused(LorryError):
    """The input is sound but the run is not allowed: nothing fits, or it would cost more than the cap."""

    code = "refused"
    exit_code = 3


class NotFound(LorryError):
    """A job, an adapter or a file that was named does not exist."""

    code = "not_found"
    exit_code = 4


class Conflict(LorryError):
    """The same name already stands for something else."""

    code = "conflict"
    exit_code = 5


class TrainingFailed(LorryError):
    """The run ended without an adapter; the cause is in result.json."""

    code = "training_failed"
    exit_code = 6


class VerificationFailed(LorryError):
    """An adapter or a file is not what its manifest says."""

    code = "verification_failed"
    exit_code = 7


class ProviderError(LorryError):
    """A cloud, a store or a tool answered with a failure that is not the user's.

    lasts: asking again changes nothing before a person has changed a right or a quota.
    """

    code = "provider_error"
    exit_code = 8
    lasts = False
