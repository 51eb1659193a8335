"""Training in its settings: `tune_head` trains a model over features of frozen encoders, by the rates of `Tuning`."""

from rada.tuning.schedule import SCHEDULES, Tuning
from rada.tuning.trainer import tune_head

__all__ = ["SCHEDULES", "Tuning", "tune_head"]
