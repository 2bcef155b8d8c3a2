"""Tests import the project's files from the folder above, wherever pytest is started."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small, threads cost more than they bring
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
