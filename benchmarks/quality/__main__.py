"""Personalization quality: every method tuned for every user on every task, on one frozen model. Figures, table and plots."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a folder: the packages are found from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.quality.command import main

if __name__ == "__main__":
    main()
