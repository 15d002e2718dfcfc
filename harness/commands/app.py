"""Every command by its name."""

from __future__ import annotations

import typer

from harness.commands import (
    claims,
    defects,
    gpu,
    league,
    lists,
    matrix,
    phantom,
    plan,
    predict,
    present,
    replay,
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
app.command("replay")(replay.replay)
app.command("league")(league.league)
app.command("models")(lists.models)
app.command("hardware")(lists.hardware)
app.command("claims")(claims.claims)
app.command("compare")(claims.compare)
app.command("devices")(gpu.devices)
app.command("confirm")(gpu.confirm)
app.command("phantom")(phantom.phantom)
app.command("table")(present.table)
app.command("figures")(present.figures)
app.command("report")(present.report)
app.command("summary")(present.summary)
app.command("reference")(present.reference)
