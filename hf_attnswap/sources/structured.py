"""JSON and YAML of files that people and programs write: whatever is wrong with them is one sentence."""

import json
from pathlib import Path
from typing import Any

import yaml

from .. import errors
from ..errors import UsageError

DEEPEST = 64  # lists and objects inside one another; no file of ours has more than 10


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UsageError: the file is not JSON, or not UTF-8, or nested too deep; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not readable as JSON: {error}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds {shown(content)}; expected an object")
    return content


def parse_json(data: bytes | str) -> Any:
    """Return the content of JSON.

    Raises:
        ValueError: as `read_json`, without the file.
    """
    try:
        content = json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    _check(content)
    return content


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases: a file of a few lines can make them stand for billions of values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"aliases (*{event.anchor}) are not read", event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file, which must not have aliases.

    Raises:
        UsageError: the file is not YAML, has an alias, or is nested too deep; the message names the file and the line.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.load(Path(path).read_bytes(), _Loader)  # noqa: S506 (a safe loader)
        _check(content)
    except RecursionError:
        raise UsageError(f"{path}: not readable as YAML: nested too deep") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # yaml lets many through
        raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return content


def line_of(node: yaml.Node | None, *keys: str | int) -> int | None:
    """Return the line, from 1, on which what stands under these keys and indices begins; None where nothing does.

    Args:
        node: what `yaml.compose` makes of a file that `read_yaml` reads.
    """
    line = 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(key)), None)
            if found is None:
                return None
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            return None
    return line


def _check(content: Any) -> None:
    """Raise ValueError where lists and objects are nested too deep: what walks them later would go too deep too."""
    level = [content]
    for _ in range(DEEPEST):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """Return `value`, which has to be a text that a tokenizer takes.

    Raises:
        ValueError: it is something else, or holds half of a surrogate pair, as "\\ud800" in JSON does.
    """
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(value)}, with half of a surrogate pair at {error.start}; expected a text") from None
    return value


def shown(value: Any) -> str:
    """Return a value of a file as errors quote it."""
    return "null" if value is None else errors.shown(value)
