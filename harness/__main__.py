"""The command line: `alst`, or `python -m harness`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from typing import Any

from alst_impl.extras import require

EXTRA = "harness"
CLOSED_PIPE = 1
"""Exit code where nobody reads what is printed, as in `alst models | true`; rich ends so, too."""
OWN = ("alst_impl", "harness")


def main() -> None:
    """Run a command. What a user wrote wrong becomes one line on stderr and exit code 2."""
    try:
        require("the command line", EXTRA, "pandas", "psutil", "rich", "typer", "yaml")
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    if sys.stdout is None:  # as after `>&-`; the next file to be opened would take its place
        sys.exit(_refuse("output is closed; send it to a file, or to /dev/null"))
    sys.exit(_run())


def _run() -> Any:
    import typer

    from harness.commands.app import app

    try:
        return _written(app(standalone_mode=False))
    except typer.TyperException as error:
        # Its own `str` leaves out the option, and its message leaves out the value.
        message = getattr(error, "format_message", error.__str__)()
        return _refuse(f"{message} (asked: alst {shlex.join(sys.argv[1:])})")
    except ValueError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in OWN:
            raise
        return _refuse(f"this command needs {name}: pip install 'alst-bench[{EXTRA}]'")
    except OSError as error:
        return _unwritten(error)
    except (typer.Abort, KeyboardInterrupt):
        print("alst: interrupted; finished cells are kept, the next run resumes", file=sys.stderr)
        return 130


def _written(code: Any) -> Any:
    """`code`, once all output is written: a full disk or a closed pipe is seen here."""
    print(end="", flush=True)
    return code


def _unwritten(error: OSError) -> int:
    """The exit code where a file or the output cannot be read or written."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter tries once more as it ends
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    named = error.filename or "output"
    return _refuse(f"{named}: {error.strerror or error}; name a place that can be read and written")


def _refuse(message: str) -> int:
    with contextlib.suppress(OSError):  # where nobody can be told, the exit code is left
        print(f"alst: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    main()
