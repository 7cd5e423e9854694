"""Define perplexity from log-likelihoods for the package `evaluate`."""

import math

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    """Measure the exponential of the negative log-likelihood per token, word or byte, over all texts."""

    def _info(self):
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: log-likelihood of each text; references: its tokens, words or bytes",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"perplexity": math.exp(-math.fsum(predictions) / sum(references))}
