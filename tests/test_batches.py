"""Which tokens a run trains and validates on, against a second cutting, token by token, written from the recipe."""

import itertools
import random
import re
import threading
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import embedded
import shards
import train_gpt
from recipe import MINI
from train_gpt import (
    UserError,
    find_shards,
    plan_batches,
    prefetch,
    read_shard,
    training_batches,
    validation_sequences,
    validation_stream,
)

BOS = MINI.model.bos_id


# ----------------------------------------------------------------------------------------------------------------------
# The second cutting: lists of Python integers, one token at a time
# ----------------------------------------------------------------------------------------------------------------------


def cut_documents(tokens):
    """The documents of one shard: tokens before the first BOS are skipped."""
    documents = []
    for token in tokens:
        if token == BOS:
            documents.append([])
        if documents:
            documents[-1].append(token)
    return documents


def cut_slice(documents, limit, size):
    """The next slice of `size` tokens from an iterator of documents; StopIteration when they run out."""
    taken = []
    while len(taken) < size:
        for token in next(documents)[:limit]:  # the rest of the document is dropped, either way
            if len(taken) < size:
                taken.append(token)
    return taken


def cut_batches(streams, steps, slices, epochs=1):
    """The batches, lists of slices, of these steps (batch_tokens, max_seq_len), as many as the shards suffice for."""
    batches = []
    for tokens in list(streams) * epochs:
        documents = iter(cut_documents(tokens))
        try:
            while len(batches) < len(steps):
                batch_tokens, limit = steps[len(batches)]
                size = batch_tokens // slices + 1
                batches.append([cut_slice(documents, limit, size) for _ in range(slices)])
        except StopIteration:
            pass  # the incomplete batch is dropped; the next shard begins it again
    return batches


# ----------------------------------------------------------------------------------------------------------------------
# Shards and settings
# ----------------------------------------------------------------------------------------------------------------------


def write(folder, streams, split="train"):
    for number, tokens in enumerate(streams, 1):
        shards.write_shard(folder / f"x_{split}_{number:06d}.bin", np.array(tokens))
    return str(folder / f"x_{split}_*.bin")


def settings_of(rows, slices, **changes):
    """Settings with a stage for each row (steps, batch_tokens, max_seq_len), and no extension."""
    stages = tuple(
        replace(MINI.extension, steps=steps, batch_tokens=batch, max_seq_len=limit) for steps, batch, limit in rows
    )
    return replace(MINI, stages=stages, extension=replace(stages[-1], steps=0), slices=slices, **changes)


def steps_of(rows):
    return [(batch, limit) for steps, batch, limit in rows for _ in range(steps)]


def batches_of(settings, which=None):
    """The run's batches as lists, of all slices or of the range `which`."""
    plan, _ = plan_batches(settings, find_shards(settings.train_files, settings.preset))
    which = range(settings.slices) if which is None else which
    return [batch.tolist() for batch in training_batches(plan, settings.model, which)]


def random_stream(rng, tokens, longest):
    """Documents of 1 to `longest` tokens, BOS included, after some tokens of a document that began elsewhere."""
    stream = [rng.randrange(BOS) for _ in range(rng.choice((0, 0, 1, 7)))]
    while len(stream) < tokens:
        length = rng.choice((1, 2, rng.randint(1, longest), rng.randint(1, longest)))
        stream += [BOS, *(rng.randrange(BOS) for _ in range(length - 1))]
    return stream[:tokens] if BOS in stream[:tokens] else stream


def document(length, fill):
    return [BOS] + [fill] * (length - 1)


def run_on(folder, streams, rows, slices=2, **changes):
    return batches_of(settings_of(rows, slices, train_files=write(folder, streams), **changes))


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_batches_are_those_of_the_recipe_cut_token_by_token(seed, tmp_path):
    rng = random.Random(seed)
    slices = rng.choice((1, 2, 4, 8))
    rows = [
        (rng.randint(1, 5), slices * rng.choice((1, 2, 9, 16, 31)), rng.choice((1, 2, 5, 11, 30)))
        for _ in range(rng.randint(2, 4))
    ]
    epochs = rng.randint(1, 3)
    streams = [random_stream(rng, rng.randint(40, 900), rng.choice((3, 12, 50))) for _ in range(rng.randint(1, 4))]
    expected = cut_batches(streams, steps_of(rows), slices, epochs)
    settings = settings_of(rows, slices, epochs=epochs, train_files=write(tmp_path, streams))
    if len(expected) == settings.total_steps:
        assert batches_of(settings) == expected
        return
    # Too few tokens: as many as the error says fit, and where it names a number of epochs that is the lowest.
    with pytest.raises(UserError) as error:
        batches_of(settings)
    if found := re.search(r"--epochs (\d+)", str(error.value)):
        enough = int(found[1])
        assert len(cut_batches(streams, steps_of(rows), slices, enough - 1)) < settings.total_steps
        assert batches_of(replace(settings, epochs=enough)) == cut_batches(streams, steps_of(rows), slices, enough)
        have = sum(len(batch) * (len(batch[0]) - 1) for batch in expected)
        need = sum(batch for batch, _ in steps_of(rows))
        assert {f"{have:,}", f"{need:,}"} <= set(re.findall(r"[\d,]*\d", str(error.value)))
    else:  # no number of epochs is enough
        assert len(cut_batches(streams, steps_of(rows), slices, 50)) < settings.total_steps


def test_slices_take_documents_in_order_and_begin_at_a_bos(tmp_path):
    stream = document(3, 1) + document(4, 2) + document(5, 3) + document(2, 4) + document(9, 5)
    assert run_on(tmp_path, [stream], [(1, 8, 100)]) == [
        [[BOS, 1, 1, BOS, 2], [BOS, 3, 3, 3, 3]],  # the rest of document 2 is dropped; document 3 fits exactly
    ]


def test_documents_are_cut_to_max_seq_len(tmp_path):
    stream = document(9, 1) + document(9, 2) + document(3, 3) + document(9, 4)
    assert run_on(tmp_path, [stream], [(1, 8, 3)]) == [
        [[BOS, 1, 1, BOS, 2], [BOS, 3, 3, BOS, 4]],
    ]


def test_slice_with_one_token_left_takes_the_next_bos_and_uses_that_document_up(tmp_path):
    stream = document(4, 1) + document(7, 2) + document(4, 3) + document(7, 4)
    assert run_on(tmp_path, [stream], [(1, 8, 100)]) == [
        [[BOS, 1, 1, 1, BOS], [BOS, 3, 3, 3, BOS]],
    ]


def test_shard_that_runs_out_drops_its_incomplete_batch(tmp_path):
    first = document(5, 1) + document(5, 2) + document(5, 3) + document(4, 4)  # the second batch lacks one token
    second = [9, 9] + document(5, 5) + document(5, 6)  # begins in the middle of a document
    assert run_on(tmp_path, [first, second], [(2, 8, 100)]) == [
        [[BOS, 1, 1, 1, 1], [BOS, 2, 2, 2, 2]],
        [[BOS, 5, 5, 5, 5], [BOS, 6, 6, 6, 6]],
    ]


def test_shard_whose_last_batch_fits_exactly_is_used_up(tmp_path):
    stream = document(5, 1) + document(5, 2) + document(5, 3) + document(5, 4)
    batches = run_on(tmp_path, [stream, document(5, 7) * 4], [(3, 8, 100)])
    assert [batch[0][1] for batch in batches] == [1, 3, 7]


def test_epochs_repeat_the_same_batches_in_the_same_order(tmp_path):
    streams = [random_stream(random.Random(seed), 200, 30) for seed in range(3)]
    once = len(cut_batches(streams, steps_of([(99, 32, 20)]), 2))
    twice = run_on(tmp_path, streams, [(2 * once, 32, 20)], epochs=2)
    assert once > 3
    assert twice[:once] == twice[once:] == cut_batches(streams, steps_of([(once, 32, 20)]), 2)


def test_stage_changes_batch_and_document_length_in_the_middle_of_a_shard(tmp_path):
    stream = list(itertools.chain(*(document(20, fill) for fill in range(1, 9))))
    assert run_on(tmp_path, [stream], [(1, 4, 2), (1, 8, 4)]) == [
        [[BOS, 1, BOS], [BOS, 3, BOS]],
        [[BOS, 5, 5, 5, BOS], [BOS, 7, 7, 7, BOS]],
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_rank_takes_its_consecutive_part_of_every_batch(world_size, tmp_path):
    streams = [random_stream(random.Random(seed), 3000, 40) for seed in range(2)]
    rows = [(4, 64, 11), (4, 128, 30)]
    settings = settings_of(rows, 8, train_files=write(tmp_path, streams))
    own = 8 // world_size
    ranks = [batches_of(settings, range(rank * own, (rank + 1) * own)) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks)] == cut_batches(streams, steps_of(rows), 8)


def test_batches_travel_as_int32_with_one_token_more_than_inputs(tmp_path):
    settings = settings_of([(2, 64, 20)], 4, train_files=write(tmp_path, [document(20, 1) * 20]))
    plan, _ = plan_batches(settings, find_shards(settings.train_files, "mini"))
    for batch in training_batches(plan, settings.model, range(4)):
        assert batch.dtype == torch.int32 and batch.shape == (4, 17)


def test_shards_are_read_in_name_order(tmp_path):
    for number in (10, 9, 100):
        shards.write_shard(tmp_path / f"x_train_{number:06d}.bin", np.array(document(6, number)))
    settings = settings_of([(3, 4, 10)], 1, train_files=str(tmp_path / "*_train_*.bin"))
    assert [batch[0][1] for batch in batches_of(settings)] == [9, 10, 100]


def test_plan_counts_the_tokens_of_the_shards_it_reads(tmp_path):
    streams = [random_stream(random.Random(seed), 100 + seed, 20) for seed in range(3)]
    pattern = write(tmp_path, streams)
    paths = find_shards(pattern, "mini")
    steps = len(cut_batches(streams, [(32, 20)] * 99, 2))  # all that there are
    _, sizes = plan_batches(settings_of([(steps, 32, 20)], 2), paths)
    assert sizes == {path: len(stream) for path, stream in zip(paths, streams, strict=True)}


def test_shards_that_the_run_does_not_reach_are_not_read(tmp_path):
    settings = settings_of([(2, 8, 100)], 2, train_files=write(tmp_path, [document(5, 1) * 9]))
    (tmp_path / "x_train_000002.bin").write_bytes(b"still being copied here")
    assert len(batches_of(settings)) == 2


def test_next_shard_is_checked_again_when_the_run_comes_to_it(tmp_path):
    settings = settings_of([(4, 8, 100)], 2, train_files=write(tmp_path, [document(5, 1) * 4] * 2))
    plan, sizes = plan_batches(settings, find_shards(settings.train_files, "mini"))
    shards.write_shard(tmp_path / "x_train_000002.bin", np.array(document(5, 1)))
    with pytest.raises(UserError, match="x_train_000002.bin"):
        list(training_batches(plan, settings.model, range(2)))


def test_next_shard_is_read_by_another_thread_while_this_one_is_used(tmp_path, monkeypatch):
    settings = settings_of([(4, 8, 100)], 2, train_files=write(tmp_path, [document(5, 1) * 4] * 2))
    plan, _ = plan_batches(settings, find_shards(settings.train_files, "mini"))
    readers, second = [], threading.Event()

    def noting(path, config):
        readers.append(threading.current_thread())
        if path.endswith("2.bin"):
            second.set()
        return read_shard(path, config)

    monkeypatch.setattr(train_gpt, "read_shard", noting)
    batches = training_batches(plan, settings.model, range(2))
    next(batches)
    assert second.wait(10)  # two of its own batches before it is needed
    assert threading.main_thread() not in readers
    assert len(list(batches)) == 3


def test_one_epoch_of_the_embedded_corpus_feeds_the_recipes_tiny_run(tmp_path):
    sympy = metadata.distribution("sympy")
    if sympy.version != embedded.pinned_version():
        pytest.skip(f"sympy {sympy.version} is not the pinned one")
    train, val = embedded.corpus(Path(sympy.locate_file("sympy")))
    shards.write_shard(tmp_path / embedded.TRAIN, np.concatenate(train))
    shards.write_shard(tmp_path / embedded.VAL, np.concatenate(val))
    assert MINI.epochs == 1
    plan, _ = plan_batches(MINI, find_shards(str(tmp_path / Path(MINI.train_files).name), "mini"))
    assert len(plan) == MINI.total_steps
    rows = [(stage.steps, stage.batch_tokens, stage.max_seq_len) for stage in MINI.all_stages]
    expected = cut_batches([np.concatenate(train).tolist()], steps_of(rows)[: MINI.total_steps], MINI.slices)
    assert [batch.tolist() for batch in training_batches(plan, MINI.model, range(MINI.slices))] == expected
    settings = replace(MINI, val_files=str(tmp_path / Path(MINI.val_files).name))
    sequences = validation_sequences(validation_stream(settings)[0], MINI.val_seq_len)
    assert sequences.shape == (MINI.val_tokens // MINI.val_seq_len, MINI.val_seq_len + 1)


# ----------------------------------------------------------------------------------------------------------------------
# Validation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(101,), (500,), (60, 41), (20, 20, 20, 300), (1, 99, 1)])
def test_validation_sequences_tile_the_stream_and_end_with_its_next_token(sizes, tmp_path):
    rng = random.Random(sum(sizes))
    streams = [[BOS, *(rng.randrange(257) for _ in range(size - 1))] for size in sizes]
    settings = replace(MINI, val_files=write(tmp_path, streams, "val"), val_tokens=100, val_seq_len=25)
    sequences = validation_sequences(validation_stream(settings)[0], settings.val_seq_len)
    stream = list(itertools.chain(*streams))
    assert sequences.dtype == torch.int32
    assert sequences.tolist() == [stream[start : start + 26] for start in (0, 25, 50, 75)]


def test_validation_neither_cuts_documents_nor_skips_the_tokens_before_the_first_bos(tmp_path):
    stream = [7, 7, 7] + document(60, 1) + document(60, 2)
    settings = replace(MINI, val_files=write(tmp_path, [stream], "val"), val_tokens=100, val_seq_len=50)
    read, sizes = validation_stream(settings)
    sequences = validation_sequences(read, settings.val_seq_len)
    assert sequences[0, :50].tolist() + sequences[1].tolist() == stream[:101]
    assert list(sizes.values()) == [123]


# ----------------------------------------------------------------------------------------------------------------------
# Shards: the writer in data/ and the reader in train_gpt.py
# ----------------------------------------------------------------------------------------------------------------------


def test_what_the_data_tools_write_the_run_reads(tmp_path):
    rng = np.random.default_rng(0)
    config = replace(MINI.model, vocab_size=65536, bos_id=50256)
    documents = [np.append([50256], rng.integers(0, 65536, rng.integers(0, 3000))) for _ in range(40)]
    documents[3][1:] = 65535
    stream = np.concatenate(documents)
    with shards.TokenShardWriter(tmp_path, shards.shard_names("x", "train", 1), 7001) as writer:
        for tokens in documents:
            writer.add(tokens)
    found = [read_shard(path, config) for path in find_shards(str(tmp_path / "x_train_*.bin"), "mini")]
    assert [len(tokens) for tokens, _ in found] == [7001] * (len(stream) // 7001) + [len(stream) % 7001]
    assert np.array_equal(np.concatenate([tokens for tokens, _ in found]), stream)
    for tokens, bounds in found:
        starts = [i for i, token in enumerate(tokens) if token == 50256]
        assert bounds.tolist() == [*starts, len(tokens)]


# ----------------------------------------------------------------------------------------------------------------------
# Prefetching
# ----------------------------------------------------------------------------------------------------------------------


def test_prefetching_yields_the_same_items_in_the_same_order():
    assert list(prefetch(iter(range(100)))) == list(range(100))
    assert list(prefetch(iter(()))) == []


def test_prefetching_makes_the_next_item_while_this_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def items():
        for event in made:
            event.set()
            yield event

    consumer = prefetch(items())
    assert next(consumer) is made[0]
    assert made[1].wait(10)  # without being asked for
    consumer.close()


def test_prefetching_does_not_run_far_ahead():
    made = []
    consumer = prefetch(made.append(i) or i for i in range(1000))
    for i in range(5):
        assert next(consumer) == i
        time.sleep(0.02)
    assert len(made) <= 5 + 4
    consumer.close()


def test_exception_of_the_prefetching_thread_is_raised_where_the_items_are_used():
    def items():
        yield 1
        yield 2
        raise UserError("the third")

    consumer = prefetch(items())
    assert [next(consumer), next(consumer)] == [1, 2]
    with pytest.raises(UserError, match="the third"):
        next(consumer)


@pytest.mark.parametrize("end", ["closed", "exhausted", "thrown into", "broken"])
def test_prefetching_thread_ends_with_its_consumer(end):
    def items():
        yield from range(3)
        if end == "broken":
            raise UserError("broken")
        yield from range(3, 1000 if end in ("closed", "thrown into") else 5)

    before = set(threading.enumerate())
    consumer = prefetch(items())
    assert next(consumer) == 0
    if end == "closed":
        consumer.close()
    elif end == "thrown into":
        with pytest.raises(KeyError):
            consumer.throw(KeyError("stop"))
    elif end == "exhausted":
        assert list(consumer) == [1, 2, 3, 4]
    else:
        with pytest.raises(UserError):
            list(consumer)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_shard_that_shrinks_during_a_run_of_several_epochs_is_named(tmp_path):
    stream = document(5, 1) * 8
    pattern = write(tmp_path, [stream])
    settings = settings_of([(6, 8, 100)], 2, epochs=2, train_files=pattern)
    paths = find_shards(pattern, "mini")
    plan, _ = plan_batches(settings, paths)
    assert plan[-1].documents[-1] < max(batch.documents[-1] for batch in plan)
    write(tmp_path, [stream[:20]])
    with pytest.raises(UserError, match="changed while the run was reading it"):
        list(training_batches(plan, settings.model, range(2)))
