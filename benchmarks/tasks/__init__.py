"""The benchmark's tasks: a file here with a function under `register_task` is a task."""

from ..registry import TASKS, TaskSpec, import_every_module, register_task

__all__ = ["TASKS", "TaskSpec", "register_task"]

import_every_module(__name__, __path__)
