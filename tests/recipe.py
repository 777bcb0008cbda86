"""The presets as the recipe has them, typed in once more: the tables, and what tests work with.

What tests work out by hand they work out from these, and runs that only need some network and some
schedule have these; so an edit of the tables in train_gpt.py changes nothing there. That both say
the same is a test of its own, in test_techniques.py, with the marker `recipe`.
"""

from dataclasses import replace

from train_gpt import Layer, ModelConfig, Settings, Stage

RECORD_LAYERS = (
    Layer(paired_heads=True, narrow_qk=True, gates=True),
    Layer(narrow_qk=True, value_embeds=0, xsa=True),
    Layer(paired_heads=True, narrow_qk=True, value_embeds=1),
    Layer(window="long", xsa=True, attention_gate=True),
    Layer(narrow_qk=True, xsa=True, gates=True),
    Layer(paired_heads=True, narrow_qk=True),
    Layer(attention=False, skip=3),
    Layer(narrow_qk=True, xsa=True),
    Layer(narrow_qk=True, value_embeds=2, single_input=7),
    Layer(paired_heads=True, narrow_qk=True, value_embeds=3, single_input=7),
    Layer(
        window="long", value_embeds=4, attention_gate=True, dc=True, single_input=7, mudd=(7, 9, 3)
    ),
)
RECORD_STAGES = (
    Stage(
        steps=423, batch_tokens=131_072, max_seq_len=896, windows=(128, 384), lr=1.0,
        mtp=((1, 0.5, 0.25), (1, 0.5, 0)), prefix=(0.25, 0.25), tied=True,
    ),
    Stage(
        steps=424, batch_tokens=262_144, max_seq_len=2048, windows=(384, 896), lr=1.52,
        mtp=((1, 0.5, 0), (1, 0, 0)), prefix=(0.25, 0), tied=True,
    ),
    Stage(
        steps=423, batch_tokens=393_216, max_seq_len=2048, windows=(640, 1408), lr=1.73,
        mtp=((1, 0, 0), (1, 0, 0)),
    ),
)
MINI_LAYERS = (
    Layer(paired_heads=True, narrow_qk=True, value_embeds=0, attention_gate=True, gates=True),
    Layer(window="long", xsa=True, attention_gate=True),
    Layer(attention=False, skip=0),
    Layer(narrow_qk=True, value_embeds=1, xsa=True, attention_gate=True),
    Layer(
        window="long", value_embeds=2, xsa=True, attention_gate=True, dc=True, single_input=3,
        mudd=(3, 2, 1),
    ),
)
MINI_STAGES = (
    Stage(
        steps=120, batch_tokens=8192, max_seq_len=512, windows=(64, 128), lr=1.0,
        mtp=((1, 0.5, 0.25), (1, 0.5, 0)), tied=True,
    ),
    Stage(
        steps=120, batch_tokens=8192, max_seq_len=1024, windows=(64, 128), lr=1.0,
        mtp=((1, 0.5, 0), (1, 0, 0)), tied=True,
    ),
    Stage(
        steps=120, batch_tokens=8192, max_seq_len=1024, windows=(64, 256), lr=1.0,
        mtp=((1, 0, 0), (1, 0, 0)),
    ),
)

OPTIMIZERS = {
    "muon_wd": 1.2, "muon_beta2": 0.9, "adam_every": 2, "adam_lr": 0.008, "adam_wd": 0.005,
    "cooldown": 0.6, "final_lr": 0.15,
}

PRESETS = {
    "record": Settings(
        preset="record",
        model=ModelConfig(
            RECORD_LAYERS, vocab_size=50257, bos_id=50256, dim=768, heads=6, attention_scale=0.1,
            bigram_rows=7.5, bigram_dim=768,
        ),
        stages=RECORD_STAGES,
        extension=replace(RECORD_STAGES[-1], steps=15, windows=(768, 1664)),
        val_short_window=768,
        val_long_window=2560,
        slices=8,
        muon_lr=0.023,
        momentum=0.95,
        momentum_warmup=300,
        momentum_cooldown=50,
        **OPTIMIZERS,
    ),
    "mini": Settings(
        preset="mini",
        model=ModelConfig(
            MINI_LAYERS, vocab_size=257, bos_id=256, dim=256, heads=4, attention_scale=0.1,
            bigram_rows=15, bigram_dim=64, gates=False,
        ),
        stages=MINI_STAGES,
        extension=replace(MINI_STAGES[-1], steps=10),
        train_files="data/sympy/sympy_train_*.bin",
        val_files="data/sympy/sympy_val_*.bin",
        val_tokens=524_288,
        val_seq_len=16_384,
        val_every=125,
        val_short_window=64,
        val_long_window=256,
        slices=4,
        multi_token=False,
        muon_lr=0.035,
        momentum=0.75,
        momentum_warmup=60,
        momentum_cooldown=15,
        tables_from=90,
        **OPTIMIZERS,
    ),
}

RECORD, MINI = PRESETS["record"], PRESETS["mini"]
PRESETS["next"] = replace(
    RECORD, preset="next", model=replace(RECORD.model, narrow_qk=True), polar_steps=6, tables_every=2
)
# Where a run says --preset tiny, its network is of no matter: the laptop track's record changes.
PRESETS["tiny"] = replace(MINI, preset="tiny")
