"""Define the errors that poolnet reports in one line."""


class InputError(ValueError):
    """Bad usage or bad input: the command ends with 2.

    The message names the thing that is wrong and how to fix it.
    """


class RunError(RuntimeError):
    """A failure of the work, not of the user's input.

    It ends the command with exit code 1, and the run is saved as FAILED.
    """


class NoAnswer(RunError):
    """A tracking server that does not answer in time."""
