"""The guide: every command and every line of Python on its pages runs, in the order of the pages."""

import re
import shlex
import subprocess
import sys

import documented
import pytest
from documented import ROOT
from training_fixtures import _fresh_accelerator  # noqa: F401

import hf_attnswap
from hf_attnswap import cli
from hf_attnswap.attentions import registry
from hf_attnswap.ops.backends import OPS
from hf_attnswap.training import command as training

GUIDE = ROOT / "docs" / "guide"
INDEX = (GUIDE / "README.md").read_text()
PAGES = ["swap", "plan", "train", "measure", "publish", "add_a_variant", "add_a_kernel"]


def test_the_index_names_every_page_in_this_order():
    assert {path.stem for path in GUIDE.glob("*.md")} == {"README", *PAGES}
    places = [INDEX.index(f"({page}.md)") for page in PAGES]
    assert places == sorted(places)


def options(line: str, monkeypatch, capsys) -> None:
    """The options of a command are those that its --help knows."""
    program, *words = shlex.split(line)
    named = [word for word in words if word.startswith("--")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        if program == "attnswap":
            patch.setattr("sys.argv", ["attnswap", words[0], "--help"])
            cli.main()
        else:
            assert program == "accelerate"
            training.main([*(words[3:5] if words[3] == "--recipe" else words[3:4]), "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in named), line


@pytest.mark.parametrize("page", PAGES)
def test_commands_know_their_options(page, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for line in documented.commands((GUIDE / f"{page}.md").read_text()):
        options(line, monkeypatch, capsys)


@pytest.fixture
def forget():
    """A variant that a page registers is gone afterwards."""
    yield
    registry._registered.pop("relu3", None)
    vars(sys.modules[hf_attnswap.attentions.__name__]).pop("relu3", None)


@pytest.mark.long
@pytest.mark.usefixtures("forget", "_fresh_accelerator")
def test_all_pages_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(documented.make_inputs(tmp_path))
    for page in PAGES:
        names = {"__name__": page}
        for step in documented.steps((GUIDE / f"{page}.md").read_text()):
            if step.endswith("\n"):
                documented.execute(step, names)
            else:
                documented.run(re.sub(r"(--max_train_tokens) \d+", r"\1 8192", step), monkeypatch)


def test_the_kernel_of_the_guide_is_a_form(tmp_path, monkeypatch):
    (code,) = documented.python((GUIDE / "add_a_kernel.md").read_text())
    (tmp_path / "mine.py").write_text(code)
    package = sys.modules["hf_attnswap.ops.scores"]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    op = OPS["scores"]
    try:
        op.discover()
        form = op.forms["mine"]
        assert form.devices == ("cpu",) and form.missing is None
    finally:
        monkeypatch.undo()
        sys.modules.pop("hf_attnswap.ops.scores.mine", None)
        vars(package).pop("mine", None)
        op.discover()


@pytest.mark.long
def test_guide_and_api_are_written_as_html(tmp_path):
    pytest.importorskip("pdoc")
    subprocess.run([sys.executable, ROOT / "docs" / "build.py", tmp_path], check=True)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"guide.html", "hf_attnswap.html", *(f"guide/{page}.html" for page in PAGES)} <= pages
    for page in ("guide.html", "guide/swap.html"):
        for link in re.findall(r'href="([^"#:$]+)[#"]', (tmp_path / page).read_text()):
            assert (tmp_path / page).parent.joinpath(link).exists(), f"{page} links to {link}"
    assert "hf_attnswap.html#swap" in (tmp_path / "guide" / "swap.html").read_text()  # the guide leads to the API
