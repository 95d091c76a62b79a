"""The one error type whose message is meant for the person at the keyboard."""


class TpawError(Exception):
    """Something the user can fix.

    The message names the file, row or key and says what to do. The command line prints it alone, without a
    traceback, and exits with status 1.
    """

    exit_status = 1


class Unavailable(TpawError):
    """A service did not answer, or a process was killed: the same command may succeed later."""

    exit_status = 75  # EX_TEMPFAIL


class Diverged(TpawError):
    """Training or scoring gave numbers that are not finite: this is the method's result under these settings."""
