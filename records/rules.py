"""What the tracks ask of a record: the loss to reach, on which tokens, and how sure it must be."""

TARGET = 3.28  # nats per token on FineWeb's validation stream
SIGNIFICANCE = 0.01
# What the presets validate on: tokens, and the files' names.
STREAMS = {"record": (10_485_760, "fineweb_val_*.bin"), "tiny": (524_288, "sympy_val_*.bin")}
