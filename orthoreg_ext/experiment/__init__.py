"""The main job: a regularised network and its unregularised twin, trained, pruned and compared."""

from .job import run
from .settings import Settings

__all__ = ["Settings", "run"]
