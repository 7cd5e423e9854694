"""The changes that the package makes to transformers: one list, applied once, told in CONTRIBUTING.md."""

from pathlib import Path

import pytest

import hf_attnswap
from hf_attnswap.integration import hooks
from hf_attnswap.publish import portable, push

CONTRIBUTING = Path(hf_attnswap.__file__).parents[1] / "CONTRIBUTING.md"


def patches():
    pytest.importorskip("peft")
    return hooks.patches(portable.with_portable, push.with_card) + hooks.peft_patches()


def test_a_second_installation_changes_nothing():
    before = [getattr(patch.owner, patch.attribute) for patch in patches()]
    hooks.install(portable.with_portable, push.with_card)
    assert [getattr(patch.owner, patch.attribute) for patch in patches()] == before


def test_every_change_is_told():
    told = CONTRIBUTING.read_text()
    for patch in patches():
        name = f"`{patch.owner.__name__.rpartition('.')[2]}.{patch.attribute}`"
        assert f"| {name} | {patch.why} |" in told
