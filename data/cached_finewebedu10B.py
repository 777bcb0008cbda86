"""Fetch FineWeb-Edu's 10B-token sample, in GPT-2's tokens: python data/cached_finewebedu10B.py [N training shards]."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where command.py lies

from command import catch_interrupts

catch_interrupts(__name__)  # before the imports that take seconds

from download import main

if __name__ == "__main__":
    main("finewebedu10B")
