"""Define the Matthews correlation for the package `evaluate`."""

import datasets
import evaluate

from ...classification import matthews


class Matthews(evaluate.Metric):
    """Measure the correlation of predicted and true labels: 1 all right, 0 chance, -1 two labels swapped."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: labels; references: labels",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"matthews_correlation": matthews(predictions, references)}
