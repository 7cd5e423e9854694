"""Tasks: generated ones, a class in a file of this folder each; local .jsonl files; and those of lm-eval."""

from .base import Task, TaskInputs
from .registry import get, help_text, names, register
from .running import answers_of, check_tasks, run_tasks, text_tokens

__all__ = [
    "Task",
    "TaskInputs",
    "answers_of",
    "check_tasks",
    "get",
    "help_text",
    "names",
    "register",
    "run_tasks",
    "text_tokens",
]
