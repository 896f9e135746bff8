"""``foldgroup`` and ``python -m foldgroup``: the command line, in a process of its own, which ends at once.

Once torch is imported, Python takes two seconds or more to end: it looks for cycles among a million objects and takes
every module apart. Nobody waits for that. What has to happen when a process ends still does: what was registered with
:mod:`atexit` runs, and standard output and error are flushed.
"""

from __future__ import annotations

import atexit
import io
import os
import sys

from foldgroup import cli


def main() -> None:
    """Run the command line and leave with its exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):  # names may have letters that the terminal or file has not
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            cli.main()
        except SystemExit as ended:
            if not isinstance(ended.code, int):
                raise
            status = ended.code
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
            stream.flush()
    except OSError as error:
        if error.filename is not None:  # of a file: foldgroup should have said so itself
            raise
        print(f"Error: the output cannot be written ({error.strerror}): check where it goes", file=sys.stderr)
        status = 2
    os._exit(status)


if __name__ == "__main__":
    main()
