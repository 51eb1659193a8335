"""Rational Adaptation of vision-language models: the head, open_clip models, tuning, inference."""

from rada.fused import RAdaHead
from rada.version import __version__



__all__ = ["RAdaHead", "__version__"]
