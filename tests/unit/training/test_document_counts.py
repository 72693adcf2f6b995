"""How much room a captured micro-batch has for documents: enough for what the data can bring, and not much more."""

from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from falcon_bridge.training.document_counts import length_frequencies, room_for_documents


def frequencies(lengths):
    return np.bincount(lengths) / len(lengths)


@pytest.mark.parametrize(
    ("rows", "length", "room"),
    [(1, 1, 32), (1, 4096, 32), (1, 4097, 64), (4, 4096, 128), (3, 100, 32), (8, 4096, 256)],
)
def test_without_an_index(rows, length, room):
    assert room_for_documents(rows, length) == room


def test_documents_of_one_length():
    # 4 · 4096 tokens hold 64 of 256 tokens, and each row cuts two more; Chernoff wants some on top
    assert room_for_documents(4, 4096, [frequencies([256])]) == 128
    assert room_for_documents(4, 4096, [frequencies([2000])]) == 32
    assert room_for_documents(2, 48, [frequencies([1])]) == 128  # no more than there are tokens, rounded up
    assert room_for_documents(2, 48, [frequencies([0])]) == 128


def test_the_worst_part_of_the_data_decides():
    short, long = frequencies([60] * 9 + [3000]), frequencies([1500, 4000])
    assert room_for_documents(4, 4096, [long]) < room_for_documents(4, 4096, [short])
    assert room_for_documents(4, 4096, [long, short]) == room_for_documents(4, 4096, [short])


@pytest.mark.parametrize("seed", range(3))
def test_random_documents_fit_and_room_is_not_wasted(seed):
    """Lengths as of text: log-normal, a mean of about 800 tokens, many of them short."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(generator.lognormal(6.2, 1.0, 20_000).astype(int) + 1, 16_384)
    room = room_for_documents(4, 4096, [frequencies(lengths)])
    most = 0
    for _ in range(2_000):
        borders = generator.choice(lengths, 600).cumsum()
        most = max(most, int(np.searchsorted(borders, 4 * 4096)) + 2 * 4)
    assert most <= room <= 4 * most
    assert room <= 128


def test_lengths_are_those_of_the_splits(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.uint16)
    lengths = [3, 3, 3, 5, 700, 700, 9, 9, 2, 2]
    for length in lengths:
        builder.add_document(np.arange(length), [length])
    builder.finalize(f"{tmp_path}/a.idx")
    dataset = SimpleNamespace(
        blend=[[f"{tmp_path}/a"], None], blend_per_split=None, data_path=None, split="80,20,0", seq_length=48
    )
    cfg = SimpleNamespace(
        dataset=dataset,
        train=SimpleNamespace(micro_batch_size=2),
        validation=SimpleNamespace(eval_micro_batch_size=4),
    )
    train, validation = length_frequencies(cfg)
    expected = np.zeros(4 * 48 + 1)
    expected[[3, 5, 9, 4 * 48]] = np.array([3, 1, 2, 2]) / 8
    assert np.allclose(train, expected) and np.allclose(validation, [0, 0, 1])
    dataset.blend = [[f"{tmp_path}/a", f"{tmp_path}/elsewhere"], None]
    assert length_frequencies(cfg) == []
    dataset.blend = None
    assert length_frequencies(cfg) == []
    assert length_frequencies(SimpleNamespace(dataset=SimpleNamespace())) == []
