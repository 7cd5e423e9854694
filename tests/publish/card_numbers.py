"""Where the numbers of a card come from: everything in it is looked for in the JSON that it was written from."""

import re
from typing import Any

from hf_attnswap import attentions
from hf_attnswap.report import Report, to_json
from hf_attnswap.report.text import count, number

ALWAYS = {
    "95",  # the level of the intervals
    "500",  # how many items are few
    "2.0",  # of the licence apache-2.0
}


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?", text))


def shown(value: Any) -> set[str]:
    """Every way in which a value of the JSON may stand in a card."""
    if isinstance(value, dict):
        return set().union(*map(shown, [*value.keys(), *value.values()]), set())
    if isinstance(value, list):
        return set().union({str(len(value))}, *map(shown, value))
    if isinstance(value, str):
        return numbers_in(value)
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int):
        return {str(value), count(value), number(value)}
    # As it is, as a duration in milliseconds, as a share in percent, as a learning rate.
    return {
        str(value),
        number(value),
        number(abs(value)),
        number(value * 1000),
        f"{100 * abs(value):.1f}",
        f"{value:g}",
    }


def strangers(text: str, report: Report | None, config: dict, *names: str) -> set[str]:
    """Numbers of a card that neither its JSON nor the description of its variants has.

    Args:
        names: of the repository and the base model.
    """
    groups = config["attnswap"]["swapped"] or []
    classes = [attentions.get(group["attention"]) for group in groups]
    described = [[cls.formula, cls.cost, cls.source] for cls in classes]
    per_layer = config.get("num_key_value_heads", 1)
    described.append(sum(per_layer * len(group["layers"]) + len(group.get("groups", ())) for group in groups))
    return numbers_in(text) - shown([report and to_json(report), config, described, *names]) - ALWAYS
