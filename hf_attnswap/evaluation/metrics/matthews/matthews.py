"""The correlation of Matthews, for the package `evaluate`."""

import datasets
import evaluate

from ...classification import matthews


class Matthews(evaluate.Metric):
    """Correlation of predicted and true labels: 1 for all right, 0 for chance, -1 for two labels exchanged."""

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
