"""Define F1 for the package `evaluate`."""

import datasets
import evaluate

from ...classification import f1


class F1(evaluate.Metric):
    """Measure the harmonic mean of precision and recall: of label 1, or with average='macro' the mean over labels."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: labels; references: labels",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, average="binary"):
        return {"f1": f1(predictions, references, average)}
