"""Find where a conversion comes from: its config.json, the model that was converted, and that model's licence."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

from ..config import NAME
from ..errors import UsageError


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json in the folder of a saved model.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} has no config.json: push a folder that save_pretrained wrote") from None
    except ValueError as error:
        raise UsageError(f"{folder}/config.json is damaged: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{folder}/config.json is damaged: it holds no object")
    return config


def find_origin(
    config: dict[str, Any], base_model: str | None, licence: str | None, token: str | None
) -> tuple[str | None, str | None]:
    """Return Hub id (None for "none") and licence of the base model.

    What the user says comes first; else the id is that in config.json, and the licence that on the base model's card.

    Raises:
        UsageError: id or licence is not known, or `base_model` is no Hub id.
    """
    base_model = base_model or (config.get(NAME) or {}).get("base")
    if base_model is None:
        raise UsageError("which model was converted is not known: pass its Hub id with --base_model (or none)")
    if base_model == "none":
        base_model = None
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", base_model):
        raise UsageError(f"base_model is {base_model!r}; expected a Hub id such as org/name, or none")
    if licence is None and base_model is not None:
        try:
            licence = ModelCard.load(base_model, token=token).data.license
        except (OSError, HTTPError, ValueError):
            licence = None
    if licence is None:
        raise UsageError(f"the licence of {base_model or 'the model'} is not known: pass it with --license")
    return base_model, licence
