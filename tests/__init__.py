"""The tests, which find the modules of bench/ by their bare names, as these find one another."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
