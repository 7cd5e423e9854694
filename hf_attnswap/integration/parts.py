"""The parts of a model (encoder, decoder, vision tower): which config describes which module."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def model_parts(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """Return the config of a model under "", and the configs of its parts under their paths in it."""
    return parts_of(model.config)


def parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Return a config under "", and its sub-configs under their paths in it."""
    found = {"": config}

    def walk(prefix: str, config: PreTrainedConfig) -> None:
        for name in config.sub_configs:
            sub = getattr(config, name, None)
            if isinstance(sub, PreTrainedConfig) and not any(sub is known for known in found.values()):
                found[f"{prefix}{name}"] = sub
                walk(f"{prefix}{name}.", sub)

    walk("", config)
    return found


def part_of(model: PreTrainedModel, name: str, module: nn.Module, parts: dict[str, PreTrainedConfig]) -> str | None:
    """Return the part of the model that a module belongs to; None where it belongs to none, or several are alike.

    Models copy their configs as they build their parts, so the object alone does not tell.
    """
    path, owner = name, module
    while True:
        config = getattr(owner, "config", None)
        for part, known in parts.items():
            if config is known and (part or len(parts) == 1 or type(config) is type(module.config)):
                return part
        if not path:
            break
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
    same = [part for part, known in parts.items() if type(known) is type(module.config)]
    return same[0] if len(same) == 1 else None
