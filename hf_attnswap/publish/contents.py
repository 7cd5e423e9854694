"""What a conversion is made of: the files of its folder that a push sends, and whether they are what they should be."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UsageError, shown
from ..sources.structured import read_object
from . import benchmarks, portable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What save_pretrained of a tokenizer writes, of any of transformers' classes.
TOKENIZER = frozenset(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model spm.model spm_char.model sentencepiece.model sentencepiece.bpe.model source.spm "
    "target.spm bpe.codes dict.txt byte_maps.json emoji.json entity_vocab.json normalizer.json prophetnet.tokenizer "
    "target_vocab.json tekken.json vocab-src.json vocab-tgt.json word_pronunciation.json word_shape.json "
    "chat_template.jinja chat_template.json".split()
)
PROCESSOR = frozenset(
    "processor_config.json preprocessor_config.json video_preprocessor_config.json audio_tokenizer_config.json".split()
)
OURS = frozenset(("README.md", "report.json", "recipe.yaml", portable.FILE))
FILES = TOKENIZER | PROCESSOR | OURS | {"config.json", "generation_config.json"}
# A processor keeps its other tokenizers in folders of their own.
FOLDERS = (
    f"{benchmarks.FOLDER}/*.yaml",
    "additional_chat_templates/*.jinja",
    *(f"*_tokenizer/{name}" for name in sorted(TOKENIZER)),
)


def files_of(folder: Path) -> list[Path]:
    """Return the files that make the conversion in `folder`, weights included, in the order of their names.

    Raises:
        UsageError: one of them is a link, or code that a push does not send; or weights are missing.
    """
    known = FILES.union(weight_files(folder))
    found = [path for path in folder.iterdir() if path.name in known]
    found += [path for pattern in FOLDERS for path in folder.glob(pattern)]
    for path in found:
        names = path.relative_to(folder).parts
        linked = next((part for part in (folder / names[0], path) if part.is_symlink()), None)
        if linked:
            raise UsageError(f"{linked} is a link: a push sends what lies in the folder alone; put a copy in its place")
    files = sorted(path for path in found if path.is_file())
    _require_no_code(folder, files)
    return files


def left_out(folder: Path, sent: Iterable[str]) -> list[str]:
    """Return what lies in `folder` and is not among the paths `sent`; of folders without such a path the name alone."""
    files, folders = set(sent), {path.partition("/")[0] for path in sent if "/" in path}
    left = []
    for path in sorted(folder.iterdir()):
        inside = [path] if path.name not in folders else sorted(path.iterdir())
        left += [each for each in inside if each.relative_to(folder).as_posix() not in files]
    return [path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "") for path in left]


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weights: the index and its shards, or the one file that transformers takes before them.

    Raises:
        UsageError: one is not there, or the index is damaged.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        needed = [SINGLE]
    else:
        names = read_object(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UsageError(f"{folder / INDEX} is damaged: weight_map is {shown(names)}; expected names of shards")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise UsageError(
                    f"{folder / INDEX} is damaged: weight_map has {shown(name)}; expected a .safetensors file beside it"
                )
        needed = [INDEX, *sorted(set(names.values()))]
    for name in needed:
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}: its weights are not whole")
    return needed


def require_finite(path: Path) -> None:
    """Raise UsageError where a .safetensors file is torn, or holds NaN or infinity; one tensor at a time is in memory.

    Args:
        path: of the file.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise UsageError(f"{path}: {name} has NaN or infinity: these weights are of no use to anyone")
    except SafetensorError as error:
        raise UsageError(f"{path} is no whole safetensors file: {error}") from None


def _require_no_code(folder: Path, files: list[Path]) -> None:
    """Raise UsageError where files name code other than that which `portable` writes, or that code was changed."""
    for path in files:
        if path.name.endswith("config.json"):
            for named in _classes(read_object(path).get("auto_map")):
                if "--" not in named and named.partition(".")[0] != portable.FILE.removesuffix(".py"):
                    raise UsageError(
                        f"auto_map in {path} names {named}, which is code, and a push sends none: publish that code in "
                        f"a repository of its own, and name it there as USER/NAME--{named}"
                    )
    code = folder / portable.FILE
    if code in files and code.read_text(encoding="utf-8", errors="replace") != portable.text_of(folder):
        raise UsageError(
            f"{code} is not what this version of hf_attnswap writes for this conversion: save it again with "
            "portable=True, or remove that file, and auto_map from config.json"
        )


def _classes(auto_map: object) -> list[str]:
    """Return all names of classes in the auto_map of a config; a tokenizer has two, of which one may be None."""
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    return [each for value in values for each in (value if isinstance(value, list) else [value]) if each]
