"""How many inputs property tests draw: a few that are always the same, or ATTNSWAP_TEST_EXAMPLES new ones of a kind."""

import os

from hypothesis import HealthCheck, settings


def examples(usual: int, same: bool = True, tests: int = 1) -> settings:
    """The settings of a test that draws inputs.

    Args:
        usual: how many, where nothing else is asked for.
        same: whether those are the same each time.
        tests: how many tests share what is asked for.
    """
    asked = os.environ.get("ATTNSWAP_TEST_EXAMPLES")
    return settings(
        max_examples=max(usual, int(asked) // tests) if asked else usual, derandomize=same and not asked,
        deadline=None, database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
