"""The named errors of ctc_ray: each also is the standard kind that fits, and each message states the remedy."""

from __future__ import annotations


class CtcRayError(Exception):
    """Base of every error that a user can mend; the command line prints its message and no traceback."""

    exit_code: int = 1
    """Exit status of `ctc-ray` when this error ends a command."""


class ConfigError(CtcRayError, ValueError):
    """A configuration key, value or command-line argument is wrong."""

    exit_code = 2


class CartridgeError(CtcRayError, OSError):
    """A cartridge, field image or event file cannot be read as what it claims to be."""


class SchemaError(CtcRayError, ValueError):
    """A table or array does not have the columns, types or shapes of its contract."""


class StaleOutputError(CtcRayError, RuntimeError):
    """An output exists that was made with another configuration or other inputs."""


class MissingInputError(CtcRayError, FileNotFoundError):
    """A stage lacks the output of an earlier one."""

    def __str__(self) -> str:
        """Give the message alone (FileNotFoundError would format errno and strerror)."""
        return str(self.args[0]) if self.args else ""


class ResourceError(CtcRayError, RuntimeError):
    """The machine or cluster lacks what a stage needs."""


class LabelError(CtcRayError, ValueError):
    """Labels are missing, contradictory or of an unknown kind."""


class RoleLeakError(CtcRayError, ValueError):
    """A patient or physical cell would be used in two roles that must stay apart."""


class WeightsError(CtcRayError, ValueError):
    """Model weights cannot be found, read or matched to their architecture."""


class TooManyFailuresError(CtcRayError, RuntimeError):
    """More units failed than `max_failure_fraction` allows."""


def named_error(kind: str, message: str) -> CtcRayError:
    """An error of ours by the name of its class, as a worker reported it; a `ResourceError` where the name is unknown."""
    kinds, found = [CtcRayError], dict[str, type[CtcRayError]]()
    while kinds:
        found |= {one.__name__: one for one in kinds}
        kinds = [below for one in kinds for below in one.__subclasses__()]
    return found.get(kind, ResourceError)(message)
