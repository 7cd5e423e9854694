"""The tables and pages: every arm and reason in each of them, the same cells, nothing from outside."""

import io
import re
import subprocess
import sys
from base64 import b64encode
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_attnswap.report import Report, pages, plots, read, show, table, tables, text, validate, write_all
from hf_attnswap.report.screen import ROWS
from hf_attnswap.statistics import Growth


def printed(content: Any, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(content)
    return console.file.getvalue()


def rows(shown: table.Table) -> list[list[str]]:
    """The header of a table and its rows."""
    return [shown.header, *shown.rows]


def letters(words: str) -> Counter[str]:
    """Every character but spaces and rules, counted: folding keeps them, cropping does not."""
    return Counter(re.sub(r"[\s─]+", "", words))


class Page(HTMLParser):
    """Cells by row, tags, and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def cells_of(rows: list[list[str]], label: str) -> dict[str, str]:
    header, *body = rows
    return next(dict(zip(header, row, strict=True)) for row in body if label in row)


def test_perplexity_by_word_and_byte(report: Report) -> None:
    shown = rows(tables.units(report))
    assert shown[0][:4] == ["arm", "per token at 512", "per word at 512", "per byte at 512"] and len(shown[0]) == 7
    assert cells_of(shown, "window:w=64 (control)")["per word at 512"] == "88.49"
    assert cells_of(shown, "window:w=64 (control)")["per byte at 512"] == text.number(44.243**0.25)
    assert len(shown) == 1 + len(report.arms) - 2  # two were not measured
    for arm in report.arms:
        for entry in arm.perplexity:
            entry.word_perplexity = entry.byte_perplexity = None
    assert tables.UNIT not in [shown.title for shown in tables.tables(report)]


def test_tasks_stand_beside_softmax(full: Report) -> None:
    shown = rows(tables.metrics(full))
    few, many = "needle at 512: found (20 items)", "needle at 2048: found (640 items)"
    assert shown[0] == ["arm", few, many] and len(shown) == 1 + 8
    assert cells_of(shown, "softmax (control)")[many] == "0.900 (reference)"
    assert cells_of(shown, "hedgehog+window") == {
        "arm": "hedgehog+window", few: "0.250; -0.700 (-0.800 to -0.600)*", many: "0.400; -0.500 (-0.600 to -0.400)",
    }  # fmt: skip
    window = full.arms[2].metrics
    window[0].difference = None
    window.pop()
    found = cells_of(rows(tables.metrics(full)), "window:w=64 (control)")
    assert found[few] == "0.200 (no interval)" and found[many] == "not measured"


def test_the_training_step_stands_beside_reading_and_writing(full: Report) -> None:
    shown = rows(tables.speed(full))
    assert shown[0][6:8] == ["training step", "training speed-up"]
    found = {(row[0], row[1]): row[6:8] for row in shown}
    assert found["2,048", "softmax (control)"] == ["1.536 s", "reference"]
    assert found["8,192", "elu"] == ["2.560 s", "×2.400 (2.280–2.544)"]
    assert found["512", "elu"] == ["not measured", "not measured"]
    assert len({len(row) for row in shown}) == 1


def test_growth_stands_by_arm(report: Report) -> None:
    shown = rows(tables.growth(report))
    assert shown[0] == ["arm", "prefill (95 %)"] and shown[1] == ["softmax (control)", "n^1.400 (1.200 to 1.600)"]
    report.arms[0].growth["train_s"] = Growth(1.1, 0.9, 1.3, 3)
    shown = rows(tables.growth(report))
    assert shown[0][2] == "training step (95 %)" and shown[1][2] == "n^1.100 (0.900 to 1.300)"
    assert shown[2][2] == "not measured"


def test_layers_are_listed_as_layers_takes_them(full: Report) -> None:
    shown = rows(tables.layers(full))
    assert shown[1] == ["none (control)", "1, 2, 0", "1,2"] and len(shown) == 8
    titles = [tables.QUALITY, tables.UNIT, tables.METRICS, tables.SPEED, tables.GROWTH, tables.LAYERS]
    assert [each.title for each in tables.tables(full)] == titles
    page, paper = pages.html(full, []), pages.paper(full, [])
    for title in titles:
        assert f"<h2>{title}</h2>" in page and f"## {title}\n" in paper
    validate(full)


def test_every_arm_has_a_quality_row_and_a_speed_row(report: Report) -> None:
    names = [table.name(arm) for arm in report.arms]
    assert [row[0] for row in tables.quality(report).rows] == names
    assert {row[1] for row in tables.speed(report).rows} == set(names)
    for shown in (tables.quality(report), tables.speed(report), tables.arms(report)):
        assert len({len(row) for row in rows(shown)}) == 1


def test_cells_show_what_was_measured(report: Report) -> None:
    shown = {row[0]: row for row in tables.quality(report).rows}
    assert shown["softmax (control)"][4] == "29.30 (reference)"
    assert shown["relu_power:p=16"][1:6] == [
        "O(n^2 d) (quadratic)", "0", "0", "30.27; ×1.033 (1.012–1.054)", "22.11; ×1.033 (1.012–1.054)"
    ]  # fmt: skip
    assert shown["hedgehog"][2:4] == ["2,211,840", "51,200"]
    assert shown["sigmoid"][4] == "1.1e12; ×3.7e10 (3.6e10–3.8e10)"
    assert shown["performer"][4:] == [
        "not measured",
        "not measured",
        "failed: loss NaN at step 3 | <b>1</b> & [red]",
    ]
    assert shown["delta"][-1] == "not measured: the time limit of 600 s was reached"
    assert shown["gelu"][-1] == "measured"
    speed = {(row[0], row[1]): row[2:] for row in tables.speed(report).rows}
    assert speed["8,192", "elu"][:2] == ["853.3 ms", "×2.400 (2.280–2.544)"]
    assert speed["8,192", "elu"][4] == "1,624"
    assert speed["512", "softmax (control)"][1] == "reference"
    assert speed["-", "gelu"] == ["not measured"] * 6 + [""]
    assert speed["-", "performer"][-1].startswith("failed: loss NaN")


def test_a_length_without_a_number_keeps_its_note(report: Report) -> None:
    nothing = dict.fromkeys(("prefill_s", "prefill_speedup", "decode_tokens_per_s", "decode_speedup"))
    entry = report.arms[0].speed[2]
    report.arms[0].speed[2] = replace(entry, **nothing, peak_memory_mib=None, note="out of memory")
    validate(report)
    speed = {(row[0], row[1]): row[2:] for row in tables.speed(report).rows}
    assert speed["8,192", "softmax (control)"] == ["not measured"] * 5 + ["163.8", "out of memory"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_folds_a_table_and_loses_nothing(report: Report, width: int) -> None:
    for shown in tables.tables(report):
        narrow = printed(table.terminal(shown), width)
        assert max(map(len, narrow.splitlines())) <= width
        assert letters(narrow) == letters(printed(table.terminal(shown), 250))


def many_arms(report: Report) -> Report:
    """Sixty arms with long labels, trained beside a trained softmax, with all marks and notes."""
    arms = [
        replace(arm, label=f"{arm.label} of a_conversion_with_a_long_name_{number}")
        for number in range(3)
        for arm in report.arms
    ]
    return replace(report, arms=[*report.arms, *arms])


def of_demo(_: Report) -> Report:
    return read(DEMO)


def of_failures(report: Report) -> Report:
    arms = [replace(arm, status="failed", reason="it broke", perplexity=[], speed=[]) for arm in report.arms[1:]]
    return replace(report, arms=[report.arms[0], *arms])


@pytest.mark.parametrize("make", [of_demo, many_arms, of_failures, lambda report: report])
def test_the_terminal_has_25_lines_of_80_columns(report: Report, make: Any) -> None:
    """Verdict, table, and where the page is."""
    made = make(report)
    lines = printed(show(made, Path("demo_report/report.html"))).splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 80
    head = next(index for index, line in enumerate(lines) if line.startswith("arm "))
    assert 2 <= lines.index("") <= 6 and lines[-1] == "All of it: demo_report/report.html"
    assert len(re.split(r" {2,}|(?<=arm) +| (?=perplexity|over|cost|prefill|decoding)", lines[head].strip())) <= 6
    assert any(line.startswith("softmax") for line in lines[head:])
    assert "\x1b" not in "".join(lines)


def test_the_terminal_says_what_matters(report: Report) -> None:
    shown = printed(show(report))
    assert "Keeps most: relu_power:p=16, ×1.033 (1.012–1.054) softmax's perplexity" in shown
    assert "Below O(n^2): hedgehog+window, ×1.400 (1.372–1.428) softmax's perplexity" in shown
    assert "Faster in the prefill: hedgehog from 8,192 on, elu from 8,192 on, and 3 more" in shown
    assert "No attention at all: ×5,200" in shown
    assert re.search(r"^none \(control\) +O\(1\) +1.1e5 +×5,200 \(5,096–5,304\) +×4.000 +×2.000", shown, re.M)
    assert f"{len(report.arms) - ROWS} more arms are on the page." in shown


def test_markdown_has_the_cells_of_the_tables(report: Report) -> None:
    page = pages.paper(report, [])
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    wanted = [*tables.tables(report), tables.arms(report)]
    found = [[unescape(cell) for cell in row] for row in cells if set(row) != {"---"}]
    assert found == [row for shown in wanted for row in rows(shown)]
    assert len({len(row) for row in cells[: len(report.arms) + 2]}) == 1
    assert "<b>" not in page and "failed: loss NaN at step 3 \\| &lt;b&gt;1&lt;/b&gt; &amp; \\[red\\]" in page


def unescape(cell: str) -> str:
    cell = re.sub(r"\\(.)", r"\1", cell)
    return cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_html_has_the_cells_of_the_tables(report: Report) -> None:
    page = Page(pages.html(report, []))
    wanted = [*tables.tables(report), tables.arms(report)]
    assert [[cell.replace("\n", " ") for cell in row] for row in page.rows] == [r for w in wanted for r in rows(w)]
    assert page.open == []


def test_html_needs_nothing_from_outside(report: Report) -> None:
    source = pages.html(report, plots.pictures(report))
    page = Page(source)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    assert not re.search(r"url\(|@import|https?://|javascript:", source)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 and all(image.startswith("data:image/svg+xml;base64,PD94bWwg") for image in images)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset") for name in attributes)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'")
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2] and "fetch" not in script
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source


DEMO = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "report.json"
HOSTILE = '</td><script>alert("1")</script>&amp;\x1b[31m\nnext'


@pytest.mark.parametrize("place", ["label", "attention", "formula", "cost", "source", "reason"])
def test_hostile_strings_of_an_arm_stay_text(report: Report, place: str) -> None:
    setattr(report.arms[-1], place, HOSTILE)
    check_hostile(report, plots.pictures(report) if place == "label" else [])


@pytest.mark.parametrize(("part", "key"), [("model", "dtype"), ("machine", "processor"), ("data", "evaluation")])
def test_hostile_strings_elsewhere_stay_text(report: Report, part: str, key: str) -> None:
    setattr(getattr(report, part), key, HOSTILE)
    report.title = report.command = HOSTILE
    report.versions[HOSTILE] = HOSTILE
    check_hostile(report, [])


def check_hostile(report: Report, pictures: list[plots.Picture]) -> None:
    source = pages.html(report, pictures)
    page = Page(source)
    assert page.open == [] and [tag for tag, _ in page.tags].count("script") == 1  # that of the page
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;&amp;amp;" in source
    paper = pages.paper(report, pictures)
    assert "<script" not in paper and "&lt;script&gt;" in paper
    for words in (source, paper, printed(show(report))):
        assert "\x1b" not in words


def test_numbers_are_short() -> None:
    values = [0, 0.00012, 0.5, 1.1064, 29.31, 111.24, 7123.4, 99_999.4, 99_999.6, 1.1e12]
    shown = ["0.000", "1.2e-4", "0.500", "1.106", "29.31", "111.2", "7,123", "99,999", "1.0e5", "1.1e12"]
    assert [text.number(value) for value in values] == shown


def test_write_all_writes_every_file(report: Report, tmp_path: Path) -> None:
    written = write_all(report, tmp_path / "new" / "folder")
    names = ["report.json", "report.md", "report.html"]
    names += [f"{name}.{kind}" for name in ("plan", "tradeoff", "dial", "positions") for kind in ("png", "svg")]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    page = written[1].read_text(encoding="utf-8")
    assert "](dial.png)" in page
    order = [page.index(words) for words in ("keeps most", "](plan.png)", "](tradeoff.png)", "## Quality\n")]
    assert order == sorted(order)


def test_the_room_imports_no_other() -> None:
    """No torch, no other room but errors, statistics and the files of sources, matplotlib only for a plot."""
    folder = Path(pages.__file__).parent
    code = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    allowed = r"sources\.(files|structured) import|errors import|statistics import| import statistics"
    assert not re.search(rf"^\s*(from|import) (torch|transformers|hf_attnswap|\.\.(?!{allowed}))", code, re.MULTILINE)
    script = (
        "import sys, types\n"
        "package = types.ModuleType('hf_attnswap')\n"  # a stand-in: the real one imports torch
        f"package.__path__ = [{str(folder.parent)!r}]\n"
        "sys.modules['hf_attnswap'] = package\n"
        "import hf_attnswap.report\n"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
