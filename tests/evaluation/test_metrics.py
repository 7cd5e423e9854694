"""Labels against references by hand and beside scikit-learn, and the metrics as modules of `evaluate`."""

import math
import random

import pytest

from hf_attnswap import UsageError
from hf_attnswap.evaluation import metrics
from hf_attnswap.evaluation.classification import accuracy, f1, matthews

SAID, TRUE = [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]  # 3 true positives, 3 true negatives, 1 and 1 false


def test_by_hand():
    assert accuracy(SAID, TRUE) == 6 / 8
    assert f1(SAID, TRUE) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert matthews(SAID, TRUE) == pytest.approx((3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4))
    assert matthews([1 - x for x in TRUE], TRUE) == -1
    assert matthews([1] * 8, TRUE) == 0 and f1([0] * 8, TRUE) == 0
    assert f1([0, 1, 2], [0, 1, 1], "macro") == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("labels", (2, 4))
def test_beside_scikit_learn(labels):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = random.Random(labels)
    true = [draw.randrange(labels) for _ in range(200)]
    said = [t if draw.random() < 0.6 else draw.randrange(labels) for t in true]
    assert accuracy(said, true) == pytest.approx(sklearn.accuracy_score(true, said))
    assert f1(said, true, "macro") == pytest.approx(sklearn.f1_score(true, said, average="macro"))
    assert matthews(said, true) == pytest.approx(sklearn.matthews_corrcoef(true, said))
    if labels == 2:
        assert f1(said, true) == pytest.approx(sklearn.f1_score(true, said))


@pytest.mark.parametrize("metric", (accuracy, f1, matthews))
def test_nothing_to_compare_is_refused(metric):
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        metric([1], [1, 0])
    with pytest.raises(ValueError, match="got 0 predictions and 0 references"):
        metric([], [])


def test_more_labels_than_f1_can_take():
    with pytest.raises(ValueError, match=r"labels are \['0', '2'\]; expected 0 and 1, or average='macro'"):
        f1([0, 2], [0, 0])
    with pytest.raises(ValueError, match="average is 'micro'"):
        f1([0, 1], [0, 0], "micro")


EXPECTED = {
    "accuracy": ((SAID, TRUE), {}, {"accuracy": 0.75}),
    "agreement": ((SAID, TRUE), {}, {"agreement": 0.75}),
    "f1": (([0, 1, 2], [0, 1, 1]), {"average": "macro"}, {"f1": 5 / 9}),
    "matthews": ((SAID, TRUE), {}, {"matthews_correlation": 0.5}),
    "perplexity": (([-2.0, -4.0], [2, 1]), {}, {"perplexity": math.exp(2)}),
}


@pytest.mark.parametrize("name", metrics.NAMES)
def test_as_modules_of_evaluate(name, tmp_path):
    pytest.importorskip("evaluate", reason="the package evaluate is not installed (pip install hf_attnswap[eval])")
    (said, true), told, expected = EXPECTED[name]
    metric = metrics.load(name, cache_dir=str(tmp_path))
    assert metric.compute(predictions=said, references=true, **told) == pytest.approx(expected)
    for s, t in zip(said, true, strict=True):
        metric.add(predictions=s, references=t)
    assert metric.compute(**told) == pytest.approx(expected)


def test_an_unknown_metric_is_refused():
    with pytest.raises(UsageError, match="Unknown metric 'bleu'. Available: accuracy, agreement, f1"):
        metrics.load("bleu")
