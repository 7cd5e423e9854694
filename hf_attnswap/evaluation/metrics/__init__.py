"""Load metrics of the package `evaluate` (extra `eval`) from local modules, without a download.

metric = hf_attnswap.evaluation.metrics.load("matthews")  # or evaluate.load(path of the folder)
metric.compute(predictions=[1, 0, 1], references=[1, 1, 1])
"""

from pathlib import Path
from typing import Any

from ...errors import UsageError

NAMES = ("accuracy", "agreement", "f1", "matthews", "perplexity")


def load(name: str, **arguments: Any) -> Any:
    """Return the `evaluate.Metric` of this name.

    Args:
        name: one of `NAMES`.
        arguments: further arguments of `evaluate.load`.

    Raises:
        UsageError: the name is unknown, or the package evaluate is not installed.
    """
    if name not in NAMES:
        raise UsageError(f"Unknown metric {name!r}. Available: {', '.join(NAMES)}")
    try:
        import evaluate
    except ImportError as error:
        raise UsageError('the package evaluate is not installed: pip install "hf_attnswap[eval]"') from error
    return evaluate.load(str(Path(__file__).parent / name), **arguments)
