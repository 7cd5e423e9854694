"""Write the API documentation and the guide as HTML: python docs/build.py build/docs."""

import sys
import tempfile
from pathlib import Path

import pdoc

GUIDE = Path(__file__).parent / "guide"
API = (
    "hf_attnswap", "hf_attnswap.attentions.base", "hf_attnswap.ops.spec", "hf_attnswap.sources.models",
    "hf_attnswap.publish.push",
)  # fmt: skip


def stubs(folder: Path) -> Path:
    """Make the package `guide`, whose modules have the pages as docstrings, since pdoc writes of modules alone."""
    package = folder / "guide"
    package.mkdir()
    pages = sorted(GUIDE.glob("*.md"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for other in pages:
            text = text.replace(f"({other.name})", f"({'guide/' if page.stem == 'README' else ''}{other.stem}.html)")
        name = "__init__" if page.stem == "README" else page.stem
        (package / f"{name}.py").write_text(f"__docformat__ = 'markdown'\n__doc__ = {text!r}\n", encoding="utf-8")
    return package


def main(output: Path) -> None:
    """Write the pages of the guide, then those of the public modules."""
    with tempfile.TemporaryDirectory() as folder:
        pdoc.render.configure(docformat="google", show_source=False)
        pdoc.pdoc(stubs(Path(folder)), *API, output_directory=output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
