"""How commands end: by what reads their output, too."""

import subprocess
import sys

import pytest

COMMAND = """
import os, sys
from megadual.errors import command

@command
def main():
    if sys.argv[1] == "help":
        print("usage")
        raise SystemExit(0)
    if sys.argv[1] == "other":
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")
    for _ in range(int(sys.argv[1])):
        print("a line of what is said")

main()
"""


@pytest.mark.parametrize(
    ("said", "read", "code", "error"),
    [
        ("3", False, 141, ""),  # which fits in the buffer that is flushed at the end
        ("100000", False, 141, ""),
        ("help", False, 141, ""),
        ("3", True, 0, ""),
        ("help", True, 0, ""),
        ("other", True, 1, "BrokenPipeError"),  # of another pipe
    ],
)
def test_output_that_nobody_reads_ends_a_command_without_a_word(said, read, code, error):
    command = [sys.executable, "-c", COMMAND, said]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if not read:
            process.stdout.close()
            process.stdout = None
        _, errors = process.communicate()
    assert process.returncode == code and error in errors and bool(errors) == bool(error)
