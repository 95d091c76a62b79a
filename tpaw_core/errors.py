"""The one error type whose message is meant for the person at the keyboard."""


class TpawError(Exception):
    """Something the user can mend.

    The message names the file, row or key and says what to do. The command line prints it alone, without a
    traceback, and exits with status 1.
    """
