"""Define the errors that poolnet reports in one line.

The line names the thing that is wrong and how to fix it.
"""


class InputError(ValueError):
    """Bad usage or bad input.

    Its message is one line. The line names the thing that is wrong and how to fix it. It ends the command with exit
    code 2.
    """


class RunError(RuntimeError):
    """A failure of the work, not of the user's input.

    Its message is one line that says why. It ends the command with exit code 1, and the run is saved as FAILED.
    """


class NoAnswer(RunError):
    """A tracking server that does not answer in time."""
