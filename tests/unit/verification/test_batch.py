import pytest
import torch

from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.checkpoints import random_config


def test_tokens_cover_the_vocabulary_but_the_pad_token():
    config = random_config("plain", pad_token_id=5)
    tokens = random_batch(config, batch_size=8, seq_length=512, seed=0).tokens
    assert set(tokens.unique().tolist()) == set(range(config.vocab_size)) - {5}


def test_the_seed_decides():
    config = random_config("plain")
    first, same, other = (random_batch(config, batch_size=2, seq_length=9, seed=s).tokens for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seq_length", [8, 9, 20, 37, 64, 513])
def test_packed_rows_have_a_document_of_one_token_and_a_long_one(seq_length):
    config = random_config("plain")
    batch = random_batch(config, batch_size=2, seq_length=seq_length, seed=0, packed=True)
    assert sum(batch.documents) == seq_length
    assert 1 in batch.documents
    assert len(batch.documents) >= 3
    if seq_length > 3 * config.mamba_chunk_size + 3:
        assert any(length > config.mamba_chunk_size and length % config.mamba_chunk_size for length in batch.documents)


def test_no_document_predicts_the_next_ones_first_token():
    batch = Batch(torch.arange(14).reshape(2, 7), lengths=(3, 1, 3))
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 1, 1, 0]] * 2
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2]] * 2
    kept = batch.labels[batch.loss_mask.bool()]
    assert kept.tolist() == [1, 2, 5, 6, 8, 9, 12, 13]


def test_without_packing_a_row_is_one_document():
    batch = Batch(torch.arange(6).reshape(2, 3))
    assert batch.documents == (3,)
    assert batch.loss_mask.tolist() == [[1, 1, 0]] * 2
