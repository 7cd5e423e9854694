"""Score predicted labels against references by counts of which label was predicted for which."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Return the share of the predicted labels that are right, 0 to 1.

    Raises:
        ValueError: no labels, or different numbers of predictions and references.
    """
    _check(predictions, references)
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def f1(predictions: Sequence[Hashable], references: Sequence[Hashable], average: str = "binary") -> float:
    """Return the harmonic mean of precision and recall, 0 to 1.

    Args:
        average: "binary" for the score of label 1, "macro" for the mean of the scores of all labels.

    Raises:
        ValueError: an unknown `average`, labels other than 0 and 1 with "binary", no labels, or different numbers of
            predictions and references.
    """
    _check(predictions, references)
    labels = set(predictions) | set(references)
    if average not in ("binary", "macro"):
        raise ValueError(f"average is {average!r}; expected 'binary' or 'macro'")
    if average == "binary" and not labels <= {0, 1}:
        raise ValueError(f"labels are {sorted(map(str, labels))}; expected 0 and 1, or average='macro'")
    pairs = Counter(zip(predictions, references, strict=True))

    def of(label: Hashable) -> float:
        said = sum(n for (p, _), n in pairs.items() if p == label)
        true = sum(n for (_, r), n in pairs.items() if r == label)
        return 2 * pairs[label, label] / (said + true) if said + true else 0.0

    return of(1) if average == "binary" else math.fsum(map(of, labels)) / len(labels)


def matthews(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Return the Matthews correlation for any number of labels (Gorodkin, 2004), -1 to 1.

    The correlation is 0 where all predictions or all references are the same label.

    Raises:
        ValueError: no labels, or different numbers of predictions and references.
    """
    _check(predictions, references)
    n = len(references)
    right = sum(p == r for p, r in zip(predictions, references, strict=True))
    said, true = Counter(predictions), Counter(references)
    covariance = right * n - sum(said[label] * true[label] for label in said)
    spread = (n**2 - sum(x**2 for x in said.values())) * (n**2 - sum(x**2 for x in true.values()))
    return covariance / math.sqrt(spread) if spread else 0.0


def _check(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"got {len(predictions)} predictions and {len(references)} references; expected as many, not none"
        )
