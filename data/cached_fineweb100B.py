"""Fetch FineWeb's 100B-token sample, in GPT-2's tokens: python data/cached_fineweb100B.py [N training shards]."""

from download import main

if __name__ == "__main__":
    main("fineweb100B")
