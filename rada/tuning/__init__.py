"""Training a model over features: its settings and the loop."""

from rada.tuning.trainer import SCHEDULES, Classes, Labelled, Tuning, accuracy, predict_labels, tune_head

__all__ = ["SCHEDULES", "Classes", "Labelled", "Tuning", "accuracy", "predict_labels", "tune_head"]
