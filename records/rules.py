"""What the tracks ask of a record: the loss to reach, on which tokens, and how sure it must be."""

from typing import NamedTuple

TARGET = 3.28  # nats per token on FineWeb's validation stream
# By preset: of train_gpt.py, of the laptop track, and of the optimizer track's smaller half. All others have TARGET.
TARGETS = {"mini": 1.44, "tiny": 1.44, "laptop": 2.3}
SIGNIFICANCE = 0.01
# The optimizer track's rule on FineWeb, where losses have a known spread: (target - mean) * sqrt(n) is at least this.
OPTIMIZER_MARGIN = 0.004


class Stream(NamedTuple):
    """What is validated on: the first tokens of shards."""

    tokens: int
    files: str  # the shards' names
    # Of these tokens and the one after them, the last target, as they lie in shards: 2 bytes each. Logs have it. None:
    # nobody has run the preset yet and told.
    sha256: str | None
    train: frozenset[str] | None  # the SHA-256 of each training shard's file; None: likewise

    def contradiction(self, validated: str | None, trained: set[str]) -> str | None:
        """What a log's checksums, of the validation stream and of training shards, say against it; None: nothing.

        Older logs have none.
        """
        if self.sha256 and validated and validated != self.sha256:
            return f"validated on other tokens: their sha256 is {validated}, not {self.sha256}"
        if self.train and (others := trained - self.train):
            return f"trained on other shards, one with sha256 {min(others)}"
        return None


FINEWEB = Stream(10_485_760, "fineweb_val_*.bin", None, None)
EMBEDDED = Stream(
    524_288,
    "sympy_val_*.bin",
    "bd52e3c031e3f7273960ad42a5b3cb2ca0088491839241bbc76edbb7fde09c6c",
    frozenset({"1fcef4e9eea31884a5430c4c0e4b988781e8955702a93682d844bb406ae66013"}),
)
# By preset.
STREAMS = {
    "record": FINEWEB,
    "next": FINEWEB,
    "mini": EMBEDDED,
    "tiny": EMBEDDED,
}
# The preset whose stream a track validates on, by the track's folder. The track of one GPU has a folder in it, and a
# table, for each card, as 1gpu/rtx4090.
TRACKS = {"8xh100": "record", "1gpu": "record", "tiny": "tiny"}


def preset_of(track: str) -> str | None:
    """A track's preset; None where there is no such track."""
    return TRACKS.get(track.partition("/")[0])
