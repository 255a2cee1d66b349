"""What goes wrong, in one line that names the thing and the cure."""


class InputError(ValueError):
    """Bad usage or bad input: one line that names the thing and the cure. Ends the command with exit code 2."""


class RunError(RuntimeError):
    """The work itself failed: one line that says why. Ends the command with exit code 1 and the run as FAILED."""


class NoAnswer(RunError):
    """The tracking server was silent for too long."""
