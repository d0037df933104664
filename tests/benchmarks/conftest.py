"""The tests' way to the study's modules. Last, since other files of benchmarks have names such as ``data``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
