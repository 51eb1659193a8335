"""Tuning: `tune_head` trains a model over features of frozen encoders, `TestTimeAdapter` a head on each test image."""

from rada.tuning.schedule import SCHEDULES, Tuning
from rada.tuning.test_time import Adaptation, TestTimeAdapter
from rada.tuning.trainer import tune_head

__all__ = ["SCHEDULES", "Adaptation", "TestTimeAdapter", "Tuning", "tune_head"]
