"""Hold the `attnswap` command: thin wrappers that print, and one clear line where something is wrong."""

import sys

import typer

from ..errors import UsageError, one_line_errors
from . import bench, diagnose, doctor, estimate, evaluate, export, models, plan, publish, report, tradeoff, variants

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replace the softmax attention of pretrained transformers models, and measure what it costs.",
)

# typer may bring a click of its own, so the base of its errors is found from one that it names.
_ClickException = typer.BadParameter.__base__.__base__

app.command("ls")(variants.list_variants)
app.command()(doctor.doctor)
app.command("inspect")(models.inspect_model)
app.command()(models.convert)
app.command()(evaluate.evaluate)
app.command()(diagnose.diagnose)
app.command()(plan.plan)
app.command()(estimate.estimate)
app.command()(bench.bench)
app.command()(tradeoff.tradeoff)
app.command()(report.report)
app.command()(export.export)
app.command()(publish.card)
app.command()(publish.push)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(publish.run)


def main() -> None:
    """Run the command line and exit: 0 on success, 2 on wrong use, 1 on failure, 130 when interrupted."""
    with one_line_errors("attnswap"):
        try:
            code = app(standalone_mode=False, prog_name="attnswap")
        except _ClickException as error:
            if len(sys.argv) < 2:
                error.show()  # the help
                sys.exit(2)
            raise UsageError(error.format_message()) from error
        if code == 130:  # typer has taken the interrupt
            raise KeyboardInterrupt
    sys.exit(code)
