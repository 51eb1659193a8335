"""Tuning: `tune_head` trains a model over features of frozen encoders."""

from rada.tuning.schedule import SCHEDULES, Tuning
from rada.tuning.trainer import tune_head

__all__ = ["SCHEDULES", "Tuning", "tune_head"]
