"""Why a run ends early, with the exit status that says so."""

MEASURED_BAD = 1  # it ran, and what it measured must not be believed, or is a regression
BAD_INPUT = 2
NO_SERVER = 3
INTERRUPTED = 130


class LoadError(RuntimeError):
    """One line for the user."""

    exit_code = BAD_INPUT


class ServerUnusable(LoadError):
    """The server is absent, refuses, or went away."""

    exit_code = NO_SERVER


class Unbelievable(LoadError):
    """What was measured is not what it claims to be."""

    exit_code = MEASURED_BAD


class Regression(LoadError):
    """A result is worse than another beyond the bound."""

    exit_code = MEASURED_BAD


class Stale(LoadError):
    """A page's tables are not those of the results."""

    exit_code = MEASURED_BAD
