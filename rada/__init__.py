"""Rational Adaptation of vision-language models: the head, open_clip models, tuning, inference.

Importing it imports torch alone; open_clip, Pillow, safetensors and pyarrow are imported where they are used.
"""

from rada.checkpoint import load_head, save_head
from rada.clip import RAdaCLIP
from rada.data import load_source
from rada.fused import RAdaHead
from rada.version import __version__

__all__ = ["RAdaCLIP", "RAdaHead", "__version__", "load_head", "load_source", "save_head"]
