"""Define the interface of a generated task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..result import Result


@dataclass(frozen=True)
class TaskInputs:
    """Hold what every task gets besides the model.

    Attributes:
        lengths: tokens of the texts that a task makes, for tasks whose texts have a set length.
        limit: the most items, per length where there are lengths; None leaves the number to the task.
        batch_size: the most items that a task may put through the model at once.
        seed: seed of everything that a task draws.
        tokens: held-out text, int64 of any shape, read as one stream, without the tokens that begin a text; None where
            no text was given.
        texts: held-out texts, each by itself, for tasks that read them so.
    """

    lengths: Sequence[int] = (512,)
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    tokens: Tensor | None = None
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """Describe a generated task: a frozen dataclass in a file of this folder whose fields are the options of the task.

    Attributes:
        name: what `--tasks` calls the task.
        measures: what the task measures, in one sentence.
        text_tokens: tokens of held-out text (`TaskInputs.tokens`) that the task needs; 0 where the task reads no text.
        separate_texts: how many texts by themselves (`TaskInputs.texts`) the task reads, where `TaskInputs.limit` is
            None; 0 where it reads none.
        objectives: what models the task is for, see `integration.objectives.objective`.
    """

    name = ""
    measures = ""
    text_tokens = 0
    separate_texts = 0
    objectives: ClassVar[tuple[str, ...]] = ("next tokens",)

    def answer(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: TaskInputs) -> Any:
        """Return what `run` needs to know of the control, as JSON values.

        The control is the model that others are compared with. The default is None, for tasks that compare only
        metrics.
        """
        return None

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: TaskInputs, control: Any = None
    ) -> list[Result]:
        """Run the task on `model` and return its metrics, with scores by item so that two models can be paired.

        Args:
            control: the `answer` of the control; None where the task has none, or where there is no control.

        Raises:
            UsageError: the task does not fit the model or its inputs.
        """
        raise NotImplementedError
