"""The command line: `alst`, or `python -m harness`."""

from __future__ import annotations

import shlex
import sys

import typer

from harness.commands import (
    claims,
    defects,
    gpu,
    matrix,
    phantom,
    plan,
    predict,
    present,
    run,
    verify,
)

app = typer.Typer(
    name="alst",
    help="Reference implementation of Arctic Long Sequence Training, and the suite that tests it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command("run")(run.run)
app.command("cell")(run.cell)
app.command("cells")(run.cells)
app.command("verify")(verify.verify)
app.command("matrix")(matrix.matrix)
app.command("defects")(defects.defects)
app.command("predict")(predict.predict)
app.command("search")(predict.search)
app.command("plan")(plan.plan)
app.command("claims")(claims.claims)
app.command("compare")(claims.compare)
app.command("devices")(gpu.devices)
app.command("calibrate")(gpu.calibrate)
app.command("confirm")(gpu.confirm)
app.command("phantom")(phantom.phantom)
app.command("table")(present.table)
app.command("figures")(present.figures)
app.command("report")(present.report)
app.command("summary")(present.summary)
app.command("reference")(present.reference)


def main() -> None:
    """Run a command. What a user wrote wrong becomes one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        # Its own `str` leaves out the option, and its message leaves out the value.
        message = getattr(error, "format_message", error.__str__)()
        code = _refuse(f"{message} (asked: alst {shlex.join(sys.argv[1:])})")
    except ValueError as error:
        code = _refuse(str(error))
    except (typer.Abort, KeyboardInterrupt):
        print("alst: interrupted; finished cells are kept, the next run resumes", file=sys.stderr)
        code = 130
    sys.exit(code)


def _refuse(message: str) -> int:
    print(f"alst: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
