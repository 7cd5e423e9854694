"""Changes to a report that a test makes behind its back, frozen parts too."""

from typing import Any


def change(part: Any, /, **fields: Any) -> None:
    """Set fields without a check."""
    for name, new in fields.items():
        object.__setattr__(part, name, new)
