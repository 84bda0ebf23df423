"""Errors that end the command with one line and an exit status of their own."""

from typing import ClassVar


class ServeError(RuntimeError):
    """A refusal; the message names the operation, the value and the rule."""

    exit_code: ClassVar[int] = 1


class ConfigError(ServeError):
    """A profile, option or environment variable has a bad value."""

    exit_code = 2


class CheckpointError(ServeError):
    """The checkpoint cannot be served as it lies on disk."""

    exit_code = 3


class PlanError(ServeError):
    """The profile does not fit its cards."""

    exit_code = 3


class EngineError(ServeError):
    """The installed vLLM is not the patched one."""

    exit_code = 4
