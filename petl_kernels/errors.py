from __future__ import annotations


class InputError(ValueError):
    """Input that a user can mend: one line naming the thing, its value and what was expected.

    The command line prints the line and leaves with exit code 2.
    """
