"""Plan files: which variant stands where in a model, with the shape of the model that the plan was made for.

    model: {model_type: llama, layers: 30, key_value_groups: 3}
    attention: window
    options: {window: 128, sinks: 4}
    keep: ['18.2', '8.0']

All but `attention` may be absent; the keys are those of `SwapConfig`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from ..config import SwapConfig
from ..errors import UsageError
from ..integration.finding import inspect
from ..integration.heads import heads_of
from .files import write_whole
from .structured import read_yaml, shown

_KEYS = ("attention", "layers", "options", "kinds", "keep")


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """Hold what a plan file says.

    Attributes:
        path: the file.
        swap: the plan itself.
        model: shape of the model that the plan was made for, see `shape_of`; empty where the file does not say.
    """

    path: Path
    swap: SwapConfig
    model: dict[str, Any]

    def require(self, model: PreTrainedModel) -> None:
        """Raise UsageError where the plan was made for a model of another shape."""
        found = shape_of(model)
        for key, expected in self.model.items():
            if key in found and found[key] != expected:
                raise UsageError(
                    f"plan {str(self.path)!r} was made for a model whose {key} is {shown(expected)}, and that of this "
                    f"{type(model).__name__} is {shown(found[key])}: make a plan for this model"
                )


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return by what a plan knows its model: its type, its attention modules, and the key/value groups in each.

    `key_value_groups` is a number, or a list where layers differ; modules that cannot be swapped are not counted.
    """
    entries = [entry for entry in inspect(model) if entry.reason is None]
    groups = [shape.num_key_value_heads if (shape := heads_of(entry.module)) else None for entry in entries]
    same = len(set(groups)) == 1
    return {
        "model_type": model.config.model_type,
        "layers": len(entries),
        "key_value_groups": groups[0] if same else groups,
    }


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan file.

    Raises:
        UsageError: no such file, or one with an unknown key or an unfit value; the message names file and value.
    """
    path = Path(path)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UsageError(f"plan {str(path)!r} cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict) or not content:
        raise UsageError(f"plan {str(path)!r} holds {shown(content)}; expected keys such as attention and keep")
    model = content.pop("model", {})
    if not isinstance(model, dict):
        raise UsageError(f"plan {str(path)!r}: model is {shown(model)}; expected keys such as model_type and layers")
    for key in content:
        if key not in _KEYS:
            raise UsageError(f"plan {str(path)!r}: unknown key {shown(key)}; known are model, {', '.join(_KEYS)}")
    if not isinstance(content.get("attention", ""), str):
        raise UsageError(f"plan {str(path)!r}: attention is {shown(content['attention'])}; expected a variant's name")
    try:
        return PlanFile(path, SwapConfig(**{key: value for key, value in content.items() if value is not None}), model)
    except UsageError as error:
        raise UsageError(f"plan {str(path)!r}: {error}") from None


def write_plan(path: str | Path, swap: SwapConfig, model: PreTrainedModel | None = None, comment: str = "") -> Path:
    """Write a plan file, whole or not at all, and return its path.

    Args:
        swap: the plan. model: the model that the plan is for, swapped or not; None leaves its shape out.
        comment: lines for the top of the file.
    """
    content: dict[str, Any] = {} if model is None else {"model": shape_of(model)}
    for field in dataclasses.fields(swap):
        value = getattr(swap, field.name)
        if value is not None and value != {} and (field.name != "kinds" or value != SwapConfig.kinds):
            content[field.name] = list(value) if isinstance(value, tuple) else value
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    return write_whole(Path(path), (text + yaml.safe_dump(content, sort_keys=False, width=120)).encode())
