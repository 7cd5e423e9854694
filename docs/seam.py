"""Draw docs/seam.png: where a variant stands in a model of transformers.

python docs/seam.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

THEIRS, OURS = "#e8eaf0", "#d5ecd8"
# Left, bottom, width, height, colour, title, lines.
BOXES = [
    (
        0.0,
        1.55,
        2.5,
        1.25,
        THEIRS,
        "attention module",
        "q, k, v projections, rotary\npositions, output projection:\nunchanged",
    ),
    (
        3.3,
        1.55,
        2.5,
        1.25,
        OURS,
        "attention function",
        'found by the name "attnswap":\nreads masks, padding,\npacked texts',
    ),
    (
        6.6,
        1.55,
        2.5,
        1.25,
        OURS,
        "variant",
        "one file: formula, source,\nnew parameters,\nits activation or feature map",
    ),
    (9.9, 1.55, 2.5, 1.25, OURS, "op", "the first form that serves\nthe call: torch, or\nthe float64 reference"),
    (3.3, 0.0, 2.5, 1.0, OURS, "cache layer", "keys and values, or\na state of constant size"),
    (
        6.6,
        0.0,
        5.8,
        1.0,
        OURS,
        "config.json",
        "which variant stands in which layer: save_pretrained\nand from_pretrained bring a conversion back",
    ),
]
ARROWS = [
    ((2.5, 2.18), (3.3, 2.18)),
    ((5.8, 2.18), (6.6, 2.18)),
    ((9.1, 2.18), (9.9, 2.18)),
    ((4.55, 1.55), (4.55, 1.0)),
    ((7.85, 1.0), (7.85, 1.55)),
]


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9, 2.3))
    for left, bottom, width, height, colour, title, lines in BOXES:
        shape = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.02", facecolor=colour, lw=0.8)
        axes.add_patch(shape)
        middle = left + width / 2
        axes.text(middle, bottom + height - 0.2, title, ha="center", va="center", weight="bold", fontsize=9)
        axes.text(middle, bottom + height / 2 - 0.14, lines, ha="center", va="center", fontsize=7)
    for start, end in ARROWS:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1})
    axes.text(1.25, 1.25, "transformers", ha="center", fontsize=7, style="italic")
    axes.text(11.15, 1.25, "hf_attnswap", ha="center", fontsize=7, style="italic")
    axes.set_xlim(-0.1, 12.5)
    axes.set_ylim(-0.1, 2.9)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=160)
