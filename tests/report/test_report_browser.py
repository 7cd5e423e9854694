"""report.html in a headless browser: it opens from disk and shows what it should, on a desk and on a phone."""

import shutil
import subprocess
from pathlib import Path

import pytest

from hf_attnswap.report import Report, write_all

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
    assert found.count("<img") == 4 and found.count("<table>") == 7
    assert all(arm.label.replace("+", "+<wbr>").split(":")[0] in found for arm in full.arms)
    for dark in (False, True):
        for width, height in ((1280, 1600), (390, 1600)):
            scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
            browse(page, tmp_path, f"--screenshot={shot}", f"--window-size={width},{height}", scheme)
            pixels = imread(shot)[..., :3]
            assert pixels.shape[:2] == (height, width) and pixels.std() > 0.05
            corner = pixels[:4, :4].mean()
            assert corner < 0.2 if dark else corner > 0.9
