"""Compare what two models write of the same sound, or any two lists of texts, by their words."""

from collections.abc import Sequence

from .result import Result


def word_errors(said: Sequence[str], original: Sequence[str], task: str = "speech") -> Result:
    """Return the word error rate of texts against those of the original: the errors of all texts over all words.

    Errors are the words that were put in, left out or changed, the fewest that make one text of the other. Words are
    what white space separates; case and punctuation count.

    Args:
        said: what the model wrote, such as `processor.batch_decode(model.generate(**inputs))`.
        original: what the original wrote of the same sound.
        task: name of the task in the result.

    Raises:
        ValueError: different numbers of texts.
    """
    pairs = [(a.split(), b.split()) for a, b in zip(said, original, strict=True)]
    scores = tuple((_errors(a, b), len(b)) for a, b in pairs)
    return Result(task, "word errors", scores, higher_is_better=False, aggregate=_rate)


def _rate(scores: Sequence[tuple[int, int]]) -> float:
    """Return the errors over the words; where the original says nothing, over one word."""
    return sum(errors for errors, _ in scores) / max(1, sum(words for _, words in scores))


def _errors(said: Sequence[str], original: Sequence[str]) -> int:
    """Return Levenshtein's distance of two lists of words."""
    row = list(range(len(original) + 1))
    for i, word in enumerate(said, 1):
        above, row = row, [i]
        for j, other in enumerate(original, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]
