"""The plots: PNG and SVG of the expected size, clipped arms said so, and the dial only where there is one."""

import copy
import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from changing import change
from matplotlib.text import Text

from hf_attnswap.report import Report, facts, plots, tradeoff, write_all
from hf_attnswap.report.types import Arm, Comparison, Range

Without = Callable[[Report, str], Report]


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND"
    return struct.unpack(">II", png[16:24])


def drawn(report: Report, name: str) -> plots.Picture:
    return next(picture for picture in plots.pictures(report) if picture.name == name)


def powers(report: Report) -> list[Arm]:
    return [arm for arm in report.arms if arm.attention == "relu_power"]


def test_the_sizes(report: Report) -> None:
    pictures = plots.pictures(report)
    assert [picture.name for picture in pictures] == ["plan", "tradeoff", "dial", "positions"]
    assert size(pictures[0].png)[0] == 1500 and 200 <= size(pictures[0].png)[1] <= 500
    assert size(pictures[1].png)[0] == 1500 and 750 <= size(pictures[1].png)[1] <= 1500
    assert size(pictures[2].png) == (1050, 690)
    assert all(len(picture.png) > 20_000 for picture in pictures[1:])


def test_the_svg_is_the_same_figure_alone_in_its_file(report: Report) -> None:
    pictures = plots.pictures(report)
    assert pictures[1].svg == plots.pictures(report)[1].svg
    for picture in pictures:
        root = ElementTree.fromstring(picture.svg)
        width, height = (float(root.get(side, "").removesuffix("pt")) for side in ("width", "height"))
        assert (width / height) == pytest.approx(size(picture.png)[0] / size(picture.png)[1], rel=0.01)
        links = {value for e in root.iter() for name, value in e.items() if name.rpartition("}")[2] == "href"}
        assert links and all(link.startswith("#") for link in links)  # to glyphs and marks of its own
        assert {e.tag.rpartition("}")[2] for e in root.iter()}.isdisjoint({"image", "script", "foreignObject", "text"})
        assert 10_000 < len(picture.svg) < 250_000


def test_the_plot_shows_the_numbers(report: Report) -> None:
    before = drawn(report, "tradeoff").png
    change(report.arms[3].perplexity[1].ratio, value=4.0, low=3.9, high=4.1)
    assert drawn(report, "tradeoff").png != before


def test_positions_go_as_far_as_they_were_measured(report: Report) -> None:
    """In a context of too few blocks for a ratio, too."""
    for arm in report.arms:
        if arm.perplexity:
            entry = copy.deepcopy(arm.perplexity[0])
            change(entry, context=8192, ratio=None, by_position=[*entry.by_position, Range(4096, 8191, 3.2)])
            arm.perplexity.append(entry)
    assert facts.headline_context(report) < facts.positions_context(report) == 8192
    assert "in contexts of 8,192 tokens" in drawn(report, "positions").caption


def test_the_caption_names_what_is_clipped_and_what_is_missing(report: Report) -> None:
    caption = drawn(report, "tradeoff").caption
    assert "above 30: elu (×270.0), none (×5,200) and sigmoid (×4.0e10)." in caption
    assert "Not drawn, for want of a ratio or a speed-up: gelu, performer and delta." in caption


def test_clipped_arms_get_rows_of_their_own_in_order() -> None:
    heights = tradeoff._heights([1.0, 29.0, 300.0, 1e10])
    assert heights[:2] == [1.0, 29.0]
    assert 30.0 < heights[2] < heights[3] < 50.0


def test_labels_do_not_overlap_and_move_no_more_than_needed() -> None:
    places = [0.0, 0.01, 0.02, 0.5, 0.52, 0.9]
    moved = tradeoff._apart(places, 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
    assert moved[5] == 0.9 and moved[1] == pytest.approx(0.01) and moved[3] == pytest.approx(0.485)


def test_nothing_to_draw_is_a_picture_that_says_so(report: Report) -> None:
    for arm in report.arms:
        arm.speed = []
    picture = drawn(report, "tradeoff")
    assert picture.caption.startswith("No arm has both") and size(picture.png) == (1500, 750)


@pytest.mark.parametrize("count", [1, 2])
def test_one_length_one_kind_of_speed_and_few_arms(report: Report, count: int) -> None:
    report.arms = report.arms[: count + 1]
    for arm in report.arms:
        arm.speed = arm.speed[:1]
        arm.speed[0].decode_speedup = None
    assert size(drawn(report, "tradeoff").png)[0] == 1500


def test_the_dial_has_a_line_per_shift(report: Report) -> None:
    groups = facts.dial(report)
    assert [[arm.options["p"] for arm in arms] for _, arms in groups] == [[2, 4, 8, 16], [1, 2, 4, 8]]


def test_two_powers_are_no_dial(report: Report) -> None:
    report.arms = [a for a in report.arms if a.attention != "relu_power" or a.options["p"] in (4, 8)]
    assert facts.dial(report) == [] and len(plots.pictures(report)) == 3


def test_three_powers_of_different_shifts_are_no_dial(report: Report, without: Without) -> None:
    kept = powers(report)[:2] + powers(report)[-1:]
    other = without(report, "relu_power")
    other.arms += kept
    assert len({arm.options["p"] for arm in kept}) == 3 and facts.dial(other) == []


def test_arms_that_failed_or_repeat_a_power_do_not_count(report: Report, without: Without) -> None:
    other = without(report, "relu_power")
    other.arms += powers(report)[:3]
    assert len(facts.dial(other)) == 1
    change(other.arms[-1], status="failed", reason="it broke")
    assert facts.dial(other) == []


def test_a_dial_beyond_the_clip_says_so(report: Report) -> None:
    powers(report)[0].perplexity[1].ratio = Comparison("softmax", 1e12, 9e11, 1.1e12, 640, "worse")
    assert "Clipped at ×30.00" in drawn(report, "dial").caption
    assert "relu_power:p=2 (×1.0e12)" in drawn(report, "dial").caption


def test_a_dial_of_an_earlier_report_goes(report: Report, tmp_path: Path, without: Without) -> None:
    write_all(report, tmp_path)
    assert (tmp_path / "dial.png").exists()
    written = write_all(without(report, "relu_power"), tmp_path)
    assert not list(tmp_path.glob("dial.*")) and len(written) == 9
    assert "dial.png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_layers_are_drawn_where_they_were_looked_at(full: Report) -> None:
    pictures = plots.pictures(full)
    assert [picture.name for picture in pictures][-1] == "layers" and len(pictures[-1].png) > 20_000
    assert pictures[-1].caption.startswith("On 64 tokens.")
    before = pictures[-1].png
    full.arms[1].diagnostics.layers[1].kl = 0.7
    assert plots.pictures(full)[-1].png != before


def test_the_training_step_has_a_panel(full: Report) -> None:
    assert size(drawn(full, "tradeoff").png)[0] == 2025


def test_what_is_far_off_everywhere_is_named(report: Report) -> None:
    for point in report.arms[1].perplexity[1].by_position:
        point.nll += 5
    caption = drawn(report, "positions").caption
    assert caption.endswith("Not drawn, more than 4 nats worse everywhere: none.")


def test_the_front_holds_what_nothing_beats(report: Report) -> None:
    front = facts.pareto(report, "prefill_speedup")
    assert [arm.label for arm, _ in front] == ["softmax", "hedgehog+window", "window:w=64", "none"]
    assert [speed for _, speed in front] == [1.0, 1.6, 2.6, 4.0]
    for arm in report.arms:  # softmax is slower than nothing that is also better
        if arm.attention != "softmax":
            arm.speed = [replace(entry, prefill_speedup=None) for entry in arm.speed]
    assert [arm.label for arm, _ in facts.pareto(report, "prefill_speedup")] == ["softmax"]


def test_the_crossover_is_interpolated(report: Report) -> None:
    elu = next(arm for arm in report.arms if arm.label == "elu")  # 0.6, 1.02 and 2.4 times at 512, 2048 and 8192
    share = math.log(1 / 0.6) / math.log(1.02 / 0.6)
    assert facts.crossover(elu, "prefill_speedup") == pytest.approx(512 * 4**share)
    power = powers(report)[0]
    assert facts.crossover(power, "prefill_speedup") is None


def test_a_dollar_sign_in_a_name_is_no_mathematics(full: Report) -> None:
    """matplotlib fails at what it cannot read as mathematics, and draws the rest of it without its signs."""
    names = itertools.cycle(("$x$", r"\$\frac{1}{2}$", "a $ b", "$$", r"$\no{such}$"))
    for arm, name in zip(full.arms, names, strict=False):
        change(arm, label=f"{name}{arm.label}")
    for picture in plots.pictures(full):
        if picture.name in ("tradeoff", "positions"):
            labels = {text.get_text() for text in picture.figure.findobj(Text)}
            assert any(r"\$x\$" in label for label in labels)
            picture.figure.canvas.draw()
