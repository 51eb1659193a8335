"""Tuning: `tune_head` trains a model over features of frozen encoders, `FineTuner` towers and head on images,
`TestTimeAdapter` a head on each test image."""

from rada.tuning.full import PARALLEL, FineTuner, FullTuning
from rada.tuning.interpolation import wise_ft
from rada.tuning.schedule import SCHEDULES, Tuning
from rada.tuning.test_time import Adaptation, TestTimeAdapter
from rada.tuning.trainer import tune_head

__all__ = [
    "PARALLEL",
    "SCHEDULES",
    "Adaptation",
    "FineTuner",
    "FullTuning",
    "TestTimeAdapter",
    "Tuning",
    "tune_head",
    "wise_ft",
]
