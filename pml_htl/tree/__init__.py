"""From class statistics to the class tree."""

from .class_tree import ClassTree
from .statistics import ClassStatistics

__all__ = ["ClassStatistics", "ClassTree"]
