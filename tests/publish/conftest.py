"""A conversion with a tokenizer and a report, and a Hub to push it to."""

from pathlib import Path

import pytest
from local_hub import Hub
from tiny_conversion import save_conversion


@pytest.fixture(scope="session")
def conversion(tmp_path_factory) -> Path:
    return save_conversion(tmp_path_factory.mktemp("conversion") / "converted")


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """The client of this process speaks to the double, as someone who may write."""
    from huggingface_hub import constants

    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of an earlier test
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub
