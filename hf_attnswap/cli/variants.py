"""Hold the command that lists the variants, and describes one."""

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import UsageError
from .options import Json, show


def list_variants(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="tell all about this one")] = None,
    as_json: Json = False,
) -> None:
    """The variants, a line each; with NAME, the formula, the options and the parameters of one.

    Example: attnswap ls hedgehog
    """
    from .. import available
    from ..attentions import get

    if name is None:
        variants = [_description(cls) for cls in available()]
        show(as_json, variants, _overview(variants))
        return
    try:
        variant = _description(get(name))
    except ValueError as error:
        raise UsageError(str(error)) from None
    show(as_json, variant, _details(variant))


def _description(cls: type) -> dict[str, Any]:
    from ..attentions import Heads
    from ..ops.backends import backends_of

    return {
        "name": cls.name,
        "says": (cls.__doc__ or "").splitlines()[0],
        "control": cls.control,
        "formula": cls.formula,
        "cost": cls.cost,
        "cost_class": cls.cost_class,
        "backends": {op: backends_of(op) for op in cls.ops},
        "kinds": list(cls.kinds),
        "masks": "any" if cls.any_mask else f"padding, packed{', sliding' * cls.slides}",
        "state": "constant" if cls.stateful else "keys, values",
        "parameters": [name for name, _ in cls(Heads(1, 1, 1)).named_parameters()],
        "options": {n: {"default": o.default, "help": o.help} for n, o in cls.options().items()},
        "source": cls.source,
    }


def _overview(variants: list[dict[str, Any]]) -> Table:
    """Return one line per variant, for 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("name", "cost", "masks", "cache", "learns", "source"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    table.columns[-1].ratio = 1
    for variant in variants:
        table.add_row(
            variant["name"],
            variant["cost"],
            variant["masks"].partition(",")[0],
            "fixed" if variant["state"] == "constant" else "grows",
            "yes" if variant["parameters"] else "-",
            "control" if variant["control"] else variant["source"],
        )
    table.expand = True
    table.caption = (
        "masks: any includes sliding windows, a bias, a soft cap and sinks; padding includes packed texts. cache: "
        "whether what a layer keeps while it generates grows. learns: whether it has new parameters. attnswap ls NAME "
        f"tells all about one. {_kernels()}."
    )
    table.caption_justify = "left"
    return table


def _kernels() -> str:
    from ..native import describe

    text = describe()
    return text[0].upper() + text[1:]


def _details(variant: dict[str, Any]) -> Table:
    """Return a table of all that is known of one variant."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    options = [f"{name}={option['default']}: {option['help']}" for name, option in variant["options"].items()]
    rows = {
        "name": variant["name"] + (" (a control, for comparison)" if variant["control"] else ""),
        "": variant["says"],
        "formula": variant["formula"],
        "cost": variant["cost"],
        "source": variant["source"],
        "attention": ", ".join(variant["kinds"]),
        "masks": "any, with sliding windows, a bias and sinks" if variant["masks"] == "any" else variant["masks"],
        "cache": "a state of constant size" if variant["state"] == "constant" else variant["state"],
        "options": "\n".join(options) or "none",
        "parameters": ", ".join(variant["parameters"]) or "none",
        "runs": ", ".join(
            f"{op} (the first that can serve a call: {', '.join(forms)})" for op, forms in variant["backends"].items()
        )
        or "one call of torch",
        "kernels": _kernels(),
    }
    for what, value in rows.items():
        table.add_row(what, value)
    return table
