"""Errors that a user can cause, and how a command shows them."""

import contextlib
import functools
import os
import select
import sys
from pathlib import Path

from megadual.run import exits

PIPE_CLOSED = 141  # as a shell has it of a process that SIGPIPE ended


class UserError(ValueError):
    """A mistake in what the user gave: the message names the value, the place and the fix."""

    exit_code = exits.WRONG_INPUT
    own = False  # whether one rank may see it alone


def first_line(error: object) -> str:
    """What an error says in one line, its type where it says nothing: libraries' messages may go on for pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def command(main):
    """Decorate a command's `main`: a UserError prints one line and exits with its code, no traceback. So does one whose
    output nobody reads any more (`| head`), without a line.

    Before the process group exists every rank sees the same mistake, so only rank 0 speaks.
    `MEGADUAL_TRACEBACK=1` shows the traceback too. In a folder named by `MEGADUAL_EXITS` every rank that fails leaves
    exit.RANK.CODE with its line: launchers have one code for all ranks, and kill some before they can speak.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        folder = os.environ.pop("MEGADUAL_EXITS", None)  # not for processes that this one starts
        rank = os.environ.get("RANK", "0")
        try:
            try:
                result = main(*args, **kwargs)
            except SystemExit:  # of --help, too
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return result
        except UserError as error:
            distributed = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
            line = f"error: {f'rank {rank}: ' if distributed else ''}{error}"
            _leave_exit(folder, rank, error.exit_code, line)
            if os.environ.get("MEGADUAL_TRACEBACK") == "1":
                raise
            if distributed or error.own or rank == "0":
                with contextlib.suppress(OSError):  # the terminal has closed
                    print(line, file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            if os.environ.get("MEGADUAL_TRACEBACK") == "1":
                raise
            sys.exit(exits.INTERRUPTED)
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left, which is flushed at exit
            sys.exit(PIPE_CLOSED)
        except SystemExit as end:
            if end.code:
                _leave_exit(folder, rank, end.code if isinstance(end.code, int) else 1)  # 1: of a message
            raise

    return run


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _leave_exit(folder: str | None, rank: str, code: int | str, line: str = "") -> None:
    if folder:
        with contextlib.suppress(OSError):  # a full disk, say: the launcher's code remains
            Path(folder, f"exit.{rank}.{code}").write_text(line + "\n")
