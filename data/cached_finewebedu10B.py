"""Fetch FineWeb-Edu's 10B-token sample, in GPT-2's tokens: python data/cached_finewebedu10B.py [N training shards]."""

from download import main

if __name__ == "__main__":
    main("finewebedu10B")
