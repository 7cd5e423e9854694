"""Draw the plot `layers`: what each layer costs by itself, its gradient, and how many keys it attends to."""

from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import facts
from .drawing import GRID, INK, Picture, literal
from .positions import COLOURS, LINES
from .text import count, listing
from .types import Layer, Report


def layers(report: Report) -> Picture:
    """Draw the plot; `facts.with_diagnostics(report)` must not be empty."""
    arms = facts.with_diagnostics(report)
    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    shown: tuple[tuple[str, Callable[[Layer], float | None]], ...] = (
        ("KL from softmax, this layer\nalone swapped (nats)", lambda layer: layer.kl),
        ("gradient at the layer's\ninput / softmax's", _gradient),
        ("effective keys / softmax's", _keys),
    )
    for panel, (name, value) in zip(panels, shown, strict=True):
        for index, arm in enumerate(arms):
            points = [(place, value(layer)) for place, layer in enumerate(arm.diagnostics.layers)]
            points = [(place, y) for place, y in points if y and y > 0]
            if points:
                style = LINES[index // len(COLOURS) % len(LINES)]
                label = literal(arm.label)
                panel.plot(*zip(*points, strict=True), style, color=COLOURS[index % len(COLOURS)], label=label)
        panel.set_yscale("log")
        panel.set_ylabel(name, fontsize=9)
        panel.grid(True, **GRID)
    for panel in panels[1:]:
        panel.axhline(1, color=INK, linewidth=0.9)
    panels[-1].set_xlabel("layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    return Picture("layers", "By layer", _caption(report), figure)


def _gradient(layer: Layer) -> float | None:
    ours, control = layer.gradient.layer_input, layer.gradient_of_softmax.layer_input
    return ours / control if ours is not None and control else None


def _keys(layer: Layer) -> float | None:
    ours, control = layer.effective_keys, layer.softmax_effective_keys
    return ours / control if ours is not None and control else None


def _caption(report: Report) -> str:
    arms = facts.with_diagnostics(report)
    tokens = sorted({arm.diagnostics.tokens for arm in arms})
    said = (
        f"On {listing([count(n) for n in tokens])} tokens. Above: one layer swapped and all others softmax; low layers "
        "can go. Middle: all layers swapped; far below 1 gradients vanish, far above they explode. Below: exp of the "
        "entropy of the weights, on softmax's own inputs."
    )
    return said
