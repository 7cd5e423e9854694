"""report.html in a headless browser: it opens from disk and shows what it should, on a desk, a phone and paper."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_attnswap.report import Report, read, write_all

DEMO = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "report.json"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]


def browse(page: Path, folder: Path, *arguments: str) -> str:
    told = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    run = subprocess.run(
        [BROWSER, *told, *arguments, page.as_uri()], capture_output=True, text=True, timeout=240, cwd=folder
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_page_in_a_browser_light_and_dark_on_a_desk_and_on_a_phone(full: Report, tmp_path: Path) -> None:
    from matplotlib.image import imread

    write_all(full, tmp_path)
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    found = browse(page, tmp_path, "--dump-dom")
    assert found.count("<img") == 5 and found.count("<table>") == 7
    assert all(arm.label.replace("+", "+<wbr>").split(":")[0] in found for arm in full.arms)
    for dark in (False, True):
        for width, height in ((1280, 1600), (390, 1600)):
            scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
            browse(page, tmp_path, f"--screenshot={shot}", f"--window-size={width},{height}", scheme)
            pixels = imread(shot)[..., :3]
            assert pixels.shape[:2] == (height, width) and pixels.std() > 0.05
            corner = pixels[:4, :4].mean()
            assert corner < 0.2 if dark else corner > 0.9


def evaluate(page: Path, folder: Path, width: int, expression: str) -> object:
    """What a script finds in a copy of the page whose policy allows it, in a frame: a window is never so narrow."""
    source = re.sub(r"<meta http-equiv[^>]+>", "", page.read_text())
    told = f"parent.document.body.dataset.found = JSON.stringify((() => {{{expression}}})())"
    source = source.replace("</body>", f"<script>{told}</script></body>")
    copy = folder / "copy.html"
    copy.write_text(f'<body><iframe style="width: {width}px; border: 0" srcdoc="{html.escape(source)}"></iframe>')
    found = re.search(r'data-found="([^"]*)"', browse(copy, folder, "--dump-dom", "--window-size=1400,1000"))
    return json.loads(html.unescape(found[1]))


SORTING = """
const table = [...document.querySelectorAll("table")].at(PLACE);
const titles = [...table.tHead.rows[0].cells];
const title = titles.find((each) => each.textContent.startsWith("TITLE"));
const rows = () => [...table.tBodies[0].rows].map((row) => row.cells[title.cellIndex].textContent.trim());
const seen = [rows()];
for (let click = 0; click < 3; click++) { title.firstChild.click(); seen.push(rows()); }
return seen;
"""


def sort(page: Path, folder: Path, place: int, title: str) -> list[list[str]]:
    return evaluate(page, folder, 1280, SORTING.replace("PLACE", str(place)).replace("TITLE", title))


def test_tables_sort_up_and_down_and_back(full: Report, tmp_path: Path) -> None:
    write_all(full, tmp_path)
    page = tmp_path / "report.html"
    assert browse(page, tmp_path, "--dump-dom").count("<button>") > 20  # the policy lets the script run
    before, up, down, again = sort(page, tmp_path, 0, "perplexity at 512")
    assert again == before and up != before
    numbers = [float(cell.replace(",", "").split(";")[0].split()[0]) for cell in up if cell != "not measured"]
    assert numbers == sorted(numbers) and down[: len(numbers)] == up[: len(numbers)][::-1]
    assert set(up[len(numbers) :]) == set(down[len(numbers) :]) == {"not measured"}
    _, up, _, _ = sort(page, tmp_path, 3, "prefill")
    times = [float(cell.split()[0]) / (1000 if cell.endswith("ms") else 1) for cell in up if "n" not in cell]
    assert times == sorted(times) and times[0] < 1 < times[-1]
    _, up, _, _ = sort(page, tmp_path, -1, "arm")
    assert up == sorted(up, key=lambda cell: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", cell.lower())])


WIDTHS = "return [innerWidth, document.documentElement.scrollWidth]"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(full: Report, tmp_path: Path, width: int) -> None:
    write_all(full, tmp_path)
    assert evaluate(tmp_path / "report.html", tmp_path, width, WIDTHS) == [width, width]


def test_paper_has_two_pages_and_cuts_nothing(tmp_path: Path) -> None:
    write_all(read(DEMO), tmp_path)
    page, pdf = tmp_path / "report.html", tmp_path / "report.pdf"
    browse(page, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert len(re.findall(rb"/Type /Page\b(?!s)", pdf.read_bytes())) == 2
    page.write_text(page.read_text().replace("@media print", "@media all"))
    boxes = "[...document.querySelectorAll('.wide')].filter((box) => box.scrollWidth > box.clientWidth).length"
    width = 718  # of A4 less its margins
    assert evaluate(page, tmp_path, width, f"return [document.documentElement.scrollWidth, {boxes}]") == [width, 0]
