"""Define accuracy for the package `evaluate`."""

import datasets
import evaluate

from ...classification import accuracy


class Accuracy(evaluate.Metric):
    """Measure the share of the labels that are right."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: labels; references: labels",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"accuracy": accuracy(predictions, references)}
