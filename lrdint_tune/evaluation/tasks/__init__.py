"""What can be asked of a model: one entry of ``tasks`` in a config, checked before any weights load."""

from lrdint_tune.evaluation.tasks.registry import Task, build_tasks, settings

__all__ = ["Task", "build_tasks", "settings"]
