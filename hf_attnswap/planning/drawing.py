"""Draw the Pareto plot: what is lost against how many groups keep softmax, for plans and for what they have to beat."""

from matplotlib.figure import Figure

from ..report.drawing import GRID, INK, Picture
from .arms import EVERY, PLAN
from .outcome import Arm, Outcome

_STYLES = {
    PLAN: ("#0072B2", "o", "-"),
    EVERY: ("#D55E00", "s", "--"),
    "best by gate gradient": ("#56B4E9", "v", ""),
    "best layers": ("#009E73", "D", ""),
    "random groups": ("#999999", "x", ""),
    "all swapped": ("#222222", "^", ""),
}


def pareto(outcome: Outcome) -> Picture:
    """Draw the plot of an outcome."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, (colour, marker, line) in _STYLES.items():
        arms = sorted((arm for arm in outcome.arms if _kind(arm) == name), key=lambda arm: len(arm.kept))
        if arms:
            counts, values = [len(arm.kept) for arm in arms], [arm.damage["value"] for arm in arms]
            axes.plot(counts, values, color=colour, marker=marker, linestyle=line or "none", label=name)
        for arm in arms:
            if arm.damage["low"] is not None:
                axes.vlines(len(arm.kept), arm.damage["low"], arm.damage["high"], color=colour, linewidth=1)
    if outcome.ratios:
        axes.axhline(1, color=INK, linewidth=1)
        axes.set_yscale("log")
    what = "perplexity / softmax's" if outcome.ratios else "squared distance from softmax's answers"
    axes.set_xlabel(f"key/value groups that keep softmax, of {outcome.total}")
    axes.set_ylabel(f"{what}, untrained")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", **GRID)
    axes.legend(frameon=False, fontsize=9)
    caption = f"{what.capitalize()} by the number of groups that keep softmax; elsewhere {outcome.elsewhere}. "
    return Picture("pareto", "Which groups keep softmax", caption + "Bars are 95 % intervals.", figure)


def _kind(arm: Arm) -> str:
    """Return the name of the line that an arm belongs to."""
    return next((name for name in _STYLES if arm.name == name or arm.name.startswith(f"{name} ")), arm.name)
