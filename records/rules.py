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
    train_files: str  # those of the training shards
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


FINEWEB = Stream(10_485_760, "fineweb_val_*.bin", "fineweb_train_*.bin", None, None)
EMBEDDED = Stream(
    524_288,
    "sympy_val_*.bin",
    "sympy_train_*.bin",
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


class Track(NamedTuple):
    """What the records of a track have in common."""

    preset: str  # whose stream they validate on
    gpus: int  # 0: a CPU, whatever it is called
    card: str  # the name of each GPU, as PyTorch gives it

    @property
    def hardware(self) -> str:
        """As it stands in logs."""
        return f"{self.gpus} x {self.card}"


# By the folder. The track of one GPU has a folder in it, and a table, for each card.
TRACKS = {
    "8xh100": Track("record", 8, "NVIDIA H100 80GB HBM3"),
    "1gpu/h100": Track("record", 1, "NVIDIA H100 80GB HBM3"),
    "1gpu/rtx4090": Track("record", 1, "NVIDIA GeForce RTX 4090"),
    "1gpu/rtx3090": Track("record", 1, "NVIDIA GeForce RTX 3090"),
    "tiny": Track("tiny", 0, ""),
}
