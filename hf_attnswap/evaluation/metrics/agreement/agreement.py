"""Define the agreement with a teacher for the package `evaluate`."""

import datasets
import evaluate

from ...classification import accuracy


class Agreement(evaluate.Metric):
    """Measure the share of the labels or tokens that a swapped model has in common with the original."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: labels or tokens of the student; references: those of the teacher",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"agreement": accuracy(predictions, references)}
