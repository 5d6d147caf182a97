"""lmms-eval, which knows the tasks of `--include_path` alone: reading its own 1,927 takes seconds a process."""

from functools import partialmethod

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.tasks import TaskManager

TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
cli_evaluate()
