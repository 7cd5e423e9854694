"""What the README says runs: its five lines, and every command, on a tiny model in place of the one that it names."""

import re
import shlex

import documented
import pytest
from documented import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = documented.commands(README)
PAGES = ("README.md", "CONTRIBUTING.md", "docs/findings.md", "benchmarks/results/README.md", "model_cards/README.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in."""
    return documented.make_inputs(tmp_path_factory.mktemp("readme"))


def test_the_five_lines_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (lines,) = documented.python(README)
    lines, replaced = re.subn(r'"\w+/SmolLM2[^"]*"', repr(str(folder / "MODEL")), lines)
    assert replaced == 1
    assert documented.execute(lines, {}).startswith("The capital of France is")


def test_every_command_is_one_of_these():
    programs = {shlex.split(line)[0] for line in COMMANDS}
    assert programs == {"pip", "make", "attnswap", "accelerate"}


@pytest.mark.long
def test_the_commands_run_in_their_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for line in COMMANDS:
        told = line.startswith(("attnswap card", "attnswap push"))
        documented.run(f"{line} --license mit" if told else line, monkeypatch)


@pytest.mark.parametrize(
    "page", [*PAGES, *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/guide/*.md")))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), f"{page} links to {link}"
