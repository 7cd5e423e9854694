"""Run tasks: generated ones, each a class in a file of this folder; local .jsonl files; and tasks of lm-eval."""

from .base import Task, TaskInputs
from .registry import get, help_text, names, register
from .running import answers_of, apart, check_tasks, quality_task, run_tasks, separate_texts, text_tokens

__all__ = [
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
    "run_tasks",
    "separate_texts",
    "text_tokens",
]
