"""Errors that a user may meet: each says what was given, what is allowed and what to do.

The command line prints the message after `error: ` and leaves with `exit_code`; a library user
catches `VidgenError`. Broken invariants of our own are assertions, never these.
"""


class VidgenError(Exception):
    """Something went wrong that the message explains; the base of all errors raised on purpose."""

    exit_code = 1


class InputError(VidgenError):
    """A request, file, option or config that can't be honoured as given."""

    exit_code = 2


class ModelError(VidgenError):
    """A model folder that is missing, incomplete, damaged or not of the claimed shape."""

    exit_code = 2


class OutputError(VidgenError):
    """A place that can't be written: no permission, no space, a file in the way."""

    exit_code = 2


class Cancelled(VidgenError):
    """The work was stopped from outside, by Ctrl-C or by a callback."""

    exit_code = 130
