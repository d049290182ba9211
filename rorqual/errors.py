"""Every error a person can cause or meet, as one tree.

    RorqualError
    ├── ConfigError            a setting or a model configuration is wrong
    ├── CheckpointError        a model directory is incomplete, damaged or of another shape
    ├── DataError              a corpus, a shard or a conversation cannot be used
    ├── TrainingError          a run cannot go on: the loss diverged, memory or disk are full
    ├── BackendUnavailable     a named backend or package is missing here
    ├── UpstreamError          a server that the operator named does not answer
    ├── EngineDied             an engine's process has ended under its requests
    └── RequestError           one request is at fault; everything else goes on
        ├── NotFound           ... it names something that does not exist
        ├── Conflict           ... what it would do cannot follow on what was done
        ├── PromptTooLong      ... it does not fit the model's context
        ├── FetchError         ... the address it names is refused, or no page comes from there
        └── CapacityError      ... nothing is wrong with it, but there is no room now

An error carries what went wrong (`str(error)`) and, where there is one, what to do about it (`error.remedy`):
the command line prints both on one line, the server puts both into the error object. `assert` is for our own bugs.
"""

from __future__ import annotations


class RorqualError(Exception):
    """Base of all errors. `remedy` tells the person what to do next."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.remedy})" if self.remedy else message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross a process border (engine -> server), and keyword-only arguments do not survive the default.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[RorqualError], args: tuple[object, ...], state: dict[str, object]) -> RorqualError:
    error = kind.__new__(kind)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class ConfigError(RorqualError):
    """A setting or model configuration that cannot be right."""


class CheckpointError(RorqualError):
    """A model directory that is incomplete, damaged or of another shape than its config says."""


class DataError(RorqualError):
    """A corpus, shard or conversation that cannot be used."""


class TrainingError(RorqualError):
    """A run that cannot go on as it is configured, on this machine."""


class BackendUnavailable(RorqualError):
    """A backend named by the user that this machine does not have."""


class UpstreamError(RorqualError):
    """A server that the operator named cannot be reached or breaks off."""


class EngineDied(RorqualError):
    """The process that computed a request has ended; where it is supervised, another is being started."""


class RequestError(RorqualError):
    """One request is at fault. `param` names the offending field as the API spells it."""

    def __init__(self, message: str, *, remedy: str = "", param: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.param = param


class NotFound(RequestError):
    """The request names a model, file or route that does not exist."""


class Conflict(RequestError):
    """The request is well made, and contradicts what is there: an id that is taken, an answer that is complete."""


class PromptTooLong(RequestError):
    """Prompt and requested completion do not fit into the model's context."""


class FetchError(RequestError):
    """An address that is not fetched, or from which no usable page comes. `reason` is one word for programs."""

    def __init__(self, message: str, *, reason: str = "network", remedy: str = "", param: str | None = None) -> None:
        super().__init__(message, remedy=remedy, param=param)
        self.reason = reason


class CapacityError(RequestError):
    """The request is fine, but it does not fit now (queue full, cache too small)."""
