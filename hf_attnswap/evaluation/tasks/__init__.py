"""Run tasks: generated ones, each a class in a file of this folder; local .jsonl files; and tasks of lm-eval."""

from .base import Task, TaskInputs
from .registry import get, help_text, names, register
from .running import (
    RETRIEVAL,
    RETRIEVAL_LENGTHS,
    answers_of,
    apart,
    check_tasks,
    quality_task,
    retrieval_lengths,
    run_tasks,
    separate_texts,
    text_tokens,
)

__all__ = [
    "RETRIEVAL",
    "RETRIEVAL_LENGTHS",
    "Task",
    "TaskInputs",
    "answers_of",
    "apart",
    "check_tasks",
    "get",
    "help_text",
    "names",
    "quality_task",
    "register",
    "retrieval_lengths",
    "run_tasks",
    "separate_texts",
    "text_tokens",
]
