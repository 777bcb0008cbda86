"""What the tracks ask of a record: the loss to reach, on which tokens, and how sure it must be."""

TARGET = 3.28  # nats per token on FineWeb's validation stream
# By preset: of train_gpt.py, of the laptop track, and of the optimizer track's smaller half. All others have TARGET.
TARGETS = {"tiny": 1.44, "laptop": 2.3}
SIGNIFICANCE = 0.01
# The optimizer track's rule on FineWeb, where losses have a known spread: (target - mean) * sqrt(n) is at least this.
OPTIMIZER_MARGIN = 0.004
# What the presets validate on: tokens, and the files' names.
STREAMS = {"record": (10_485_760, "fineweb_val_*.bin"), "tiny": (524_288, "sympy_val_*.bin")}
# The preset whose stream a track validates on, by the track's folder.
TRACKS = {"8xh100": "record", "tiny": "tiny"}
