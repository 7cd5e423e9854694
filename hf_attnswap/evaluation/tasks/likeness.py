"""Compare what a classifier or an encoder makes of texts with what the original makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import UsageError
from ...integration.objectives import learned_positions
from ..likeness import Inputs, answers, compare
from ..result import Result
from .base import Task
from .registry import register


@register
@dataclass(frozen=True)
class LikenessTask(Task):
    """Read the first texts, each by itself and cut at the longest of the lengths, and compare with the control."""

    name = "likeness"
    measures = "How often the model chooses the label that the original chooses, and how alike their vectors are."
    objectives = ("labels", "vectors")
    separate_texts = 64

    def answer(self, model, tokenizer, inputs):
        return answers(model, self.batches(model, tokenizer, inputs))

    def run(self, model, tokenizer, inputs, control=None) -> list[Result]:
        if control is None:
            raise UsageError(f"task {self.name!r} compares a model with the original: name it by --control")
        return compare(self.answer(model, tokenizer, inputs), control, self.name)

    def batches(self, model, tokenizer, inputs) -> Iterator[Inputs]:
        """Yield the texts as the tokenizer makes them, one by one, so that nothing is padded."""
        longest = min(max(inputs.lengths), learned_positions(model) or max(inputs.lengths))
        for text in inputs.texts[: inputs.limit or self.separate_texts]:
            yield tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
