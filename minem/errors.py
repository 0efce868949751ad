"""The three ways a run ends other than well, each with its exit code.

Everything that a person can put right is raised as one of these with one clear sentence; the command line prints
the sentence and exits with the code. Anything else is a bug in minem and keeps its traceback.
"""


class MinemError(Exception):
    """Base of the errors whose message is meant for a person."""

    exit_code = 2


class UserError(MinemError):
    """Bad input: the message names the file, field or flag, and what would be right. Exit code 2."""


class Interrupted(MinemError):
    """The run was stopped but can continue; the message says how. Exit code 3."""

    exit_code = 3


class GuardError(MinemError):
    """A guard stopped the run: non-finite numbers, or nothing accepted and so nothing to train on. Exit code 4."""

    exit_code = 4
