"""Draw the picture `plan`: what every key/value group of every layer runs, coloured by attention."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from .drawing import INK, Picture, literal
from .short import leading
from .text import count, listing, plain
from .types import Arm, Group, Report

SOFTMAX = "softmax"
_COLOURS = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2", "#999999"]
_Grid = list[list[str]]


def shown(report: Report) -> list[Arm]:
    """Return the arms that are drawn: those that run more than one attention, else the arms of the best quality."""
    mixed = [arm for arm in report.arms if len(_attentions(_grids(report, arm))) > 1]
    return mixed or [arm for arm in leading(report) if arm.swapped]


def plan(report: Report) -> Picture:
    """Draw the picture; `shown(report)` must not be empty."""
    arms = shown(report)
    grids = [(title, grid) for arm in arms for title, grid in _grids(report, arm)]
    used = _attentions(grids)
    names = [SOFTMAX, *(name for name in used if name != SOFTMAX)]
    heights = [max(0.3, 0.17 * len(grid)) for _, grid in grids]
    figure = Figure(figsize=(10, sum(heights) + 0.5 * len(grids) + 0.7), layout="constrained")
    panels = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, grid) in zip(panels, grids, strict=True):
        _draw(axes, grid, names)
        axes.set_title(literal(title), loc="left", fontsize=9.5)
    panels[-1].set_xlabel("layer")
    patches = [Patch(color=_colour(i), label=literal(name)) for i, name in enumerate(names) if name in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(4, len(patches)), frameon=False, fontsize=9)
    return Picture("plan", "What each layer runs", _caption(report, arms), figure)


def _attentions(grids: Sequence[tuple[str, _Grid]]) -> list[str]:
    """Return what stands anywhere in the grids, once."""
    return list(dict.fromkeys(cell for _, grid in grids for row in grid for cell in row))


def _draw(axes: Axes, grid: _Grid, names: Sequence[str]) -> None:
    """Draw the groups of a layer below each other, the layers from left to right."""
    numbers = [[names.index(cell) for cell in row] for row in grid]
    colours = ListedColormap([_colour(index) for index in range(len(names))])
    # A mesh, not an image: it stays sharp, and the file of the page holds nothing but paths.
    mesh = {"cmap": colours, "vmin": -0.5, "vmax": len(names) - 0.5, "edgecolors": "white", "linewidth": 1}
    layers, groups = range(len(grid[0]) + 1), range(len(grid) + 1)
    axes.pcolormesh([at - 0.5 for at in layers], [at - 0.5 for at in groups], numbers, **mesh)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(15, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True) if len(grid) > 1 else NullLocator())
    axes.set_ylabel("group" if len(grid) > 1 else "", fontsize=9)
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)


def _colour(index: int) -> str:
    return INK if index == 0 else _COLOURS[(index - 1) % len(_COLOURS)]


def _grids(report: Report, arm: Arm) -> list[tuple[str, _Grid]]:
    """Return a title and what every [group][layer] runs, for each kind of attention that `arm` swaps.

    Where all groups of every layer run the same, one row stands for them.
    """
    kinds = list(dict.fromkeys(group.kind for group in arm.swapped))
    made = []
    for kind in kinds:
        grid = _grid(report, [group for group in arm.swapped if group.kind == kind])
        cells = [cell for row in grid for cell in row]
        title = plain(arm.label) + (f", {kind} attention" if len(kinds) > 1 else "")
        kept = f"softmax in {count(cells.count(SOFTMAX))} of {count(len(cells))} key/value groups"
        alike = all(row == grid[0] for row in grid)
        made.append((f"{title}: {kept if SOFTMAX in cells else 'no softmax'}", grid[:1] if alike else grid))
    return made


def _grid(report: Report, swapped: Sequence[Group]) -> _Grid:
    places = [(layer, None, _name(group)) for group in swapped for layer in group.layers]
    for group in swapped:
        parted = [place.split(".") for place in group.groups]
        places += [(int(layer), int(within), _name(group)) for layer, within in parted]
    layers = max([report.model.attention_layers, *(layer + 1 for layer, _, _ in places)])
    per_layer = max([1, report.model.num_key_value_heads, *((within or 0) + 1 for _, within, _ in places)])
    grid = [[SOFTMAX] * layers for _ in range(per_layer)]
    for layer, within, name in places:
        for row in range(per_layer) if within is None else [within]:
            grid[row][layer] = name
    return grid


def _name(group: Group) -> str:
    """Return an attention with those of its options that are numbers other than 0: window (sinks=4, window=128)."""
    numbers = {key: value for key, value in group.options.items() if isinstance(value, int | float)}
    told = [f"{key}={value:g}" for key, value in sorted(numbers.items()) if value and not isinstance(value, bool)]
    return plain(f"{group.attention} ({', '.join(told)})" if told else group.attention)


def _caption(report: Report, arms: Sequence[Arm]) -> str:
    words = "Each column is an attention layer, each cell in it a key/value group, coloured by what it runs."
    others = [plain(arm.label) for arm in report.arms if arm not in arms and arm.swapped]
    return f"{words} Not drawn, since they run one attention in every layer: {listing(others)}." if others else words
