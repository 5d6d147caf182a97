"""Errors that a user can cause, and how a command shows them."""

import functools
import os
import sys


class UserError(ValueError):
    """A mistake in what the user gave: the message names the value, the place and the fix."""

    exit_code = 2


def command(main):
    """Decorate a command's `main`: a UserError prints one line and exits with its code, no traceback.

    Before the process group exists every rank sees the same mistake, so only rank 0 speaks.
    `MEGADUAL_TRACEBACK=1` shows the traceback too.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("MEGADUAL_TRACEBACK") == "1":
                raise
            rank = os.environ.get("RANK", "0")
            distributed = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
            if distributed or rank == "0":
                print(f"error: {f'rank {rank}: ' if distributed else ''}{error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)

    return run
