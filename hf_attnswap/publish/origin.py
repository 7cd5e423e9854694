"""Find where a conversion comes from: its config.json, the model that was converted, and that model's licence."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..config import NAME
from ..errors import UsageError, shown
from ..sources.structured import read_object


def require_repo_id(repo_id: str) -> None:
    """Raise UsageError where `repo_id` cannot be the name of a repository on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{shown(repo_id)} is not the name of a repository: {str(error).splitlines()[0]}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json in the folder of a saved model.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        return read_object(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} has no config.json: push a folder that save_pretrained wrote") from None


def find_origin(
    config: dict[str, Any], base_model: str | None, licence: str | None, token: str | None
) -> tuple[str | None, str | None]:
    """Return Hub id (None for "none") and licence of the base model.

    What the user says comes first; else the id is that in config.json, and the licence that on the base model's card.

    Raises:
        UsageError: id or licence is not known (all that is missing at once), or one of them cannot be what it says.
    """
    base_model = base_model or (config.get(NAME) or {}).get("base")
    if base_model is None:
        licensed = "" if licence else ", and its licence with --license where its card on the Hub does not say it"
        raise UsageError(
            f"which model was converted is not known: pass its Hub id with --base_model (or none){licensed}"
        )
    if base_model == "none":
        base_model = None
    else:
        try:
            require_repo_id(base_model)
        except UsageError:
            raise UsageError(
                f"base_model is {shown(base_model)}; expected a Hub id such as org/name, or none"
            ) from None
    if licence is None and base_model is not None:
        try:
            licence = ModelCard.load(base_model, token=token).data.license
        except (OSError, HTTPError, ValueError):
            licence = None
    if isinstance(licence, str) and not re.fullmatch(r"[\w.-]+", licence):
        raise UsageError(f"license is {shown(licence)}; expected the Hub's name of one, such as apache-2.0 or mit")
    if licence is None:
        raise UsageError(f"the licence of {base_model or 'the model'} is not known: pass it with --license")
    return base_model, licence
