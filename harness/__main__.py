"""The command line: `alst`, or `python -m harness`."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from alst_impl.extras import require

EXTRA = "harness"
OWN = ("alst_impl", "harness")


def main() -> None:
    """Run a command. What a user wrote wrong becomes one line on stderr and exit code 2."""
    try:
        require("the command line", EXTRA, "pandas", "psutil", "rich", "typer", "yaml")
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    sys.exit(_run())


def _run() -> Any:
    import typer

    from harness.commands.app import app

    try:
        return app(standalone_mode=False)
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
    except (typer.Abort, KeyboardInterrupt):
        print("alst: interrupted; finished cells are kept, the next run resumes", file=sys.stderr)
        return 130


def _refuse(message: str) -> int:
    print(f"alst: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
