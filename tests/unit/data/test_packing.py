"""Packed rows: every conversation once, and read by Megatron Bridge as it was meant."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import megatron.bridge.data.packing.algorithms  # noqa: F401  30 s, and not those of the first test
import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.data.chat import ChatConverter
from falcon_bridge.data.info import sft_info
from falcon_bridge.data.packing import pack, padded_lengths, split_every
from falcon_bridge.data.prepare_chat import prepare_chat
from falcon_bridge.data.tokenizer import load_tokenizer
from falcon_bridge.errors import JobError, UserError
from falcon_bridge.training.sft_dataset import pad_multiple
from tests.unit.data.chats import conversations


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 65), min_size=1, max_size=60),
    multiple=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 5),
)
def test_every_conversation_is_in_one_row(lengths, multiple, seed):
    padded = padded_lengths(np.array(lengths), multiple)
    assert all(length % multiple == 0 for length in padded)
    assert all(0 <= length - (given - 1) < multiple for length, given in zip(padded, lengths, strict=True))
    packing = pack(padded, 64, seed)
    assert sorted(number for row in packing.rows for number in row) == list(range(len(lengths)))
    assert all(padded[row].sum() <= 64 for row in packing.rows)
    assert packing == pack(padded, 64, seed)
    # first-fit leaves at most one row less than half full
    assert sum(padded[row].sum() <= 32 for row in packing.rows) <= 1


@given(documents=st.integers(2, 300), share=st.sampled_from([0.0, 0.004, 0.1, 0.5]))
def test_what_is_held_out(documents, share):
    training, validation = split_every(documents, share)
    assert sorted([*training, *validation]) == list(range(documents))
    assert len(validation) == (max(1, round(documents * share)) if share else 0)


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [
        ((1, 1, False), 1),
        ((2, 1, False), 1),
        ((2, 1, True), 2),
        ((1, 4, False), 8),
        ((8, 2, True), 16),
        ((3, 2, True), 12),
    ],
)
def test_what_a_layout_needs(layout, multiple):
    assert pad_multiple(*layout) == multiple


@pytest.fixture(scope="module")
def chat(tokenizers, tmp_path_factory):
    """Conversations, one of them bad, and a packed dataset of them."""
    base = tmp_path_factory.mktemp("chat")
    rows = conversations(60, seed=3)
    lines = [json.dumps(row) for row in rows]
    lines.insert(20, json.dumps({"messages": [{"role": "user", "content": "alone"}]}))
    (base / "chat.jsonl").write_text("\n".join(lines) + "\n")
    info = prepare_chat(
        [base / "chat.jsonl"],
        tokenizers / "difference",
        base / "out",
        seq_length=512,
        pad_multiple=4,
        validation_share=0.2,
    )
    return SimpleNamespace(rows=rows, path=base / "out", source=base / "chat.jsonl", info=info)


def bridge_dataset(chat, file, tokenizer):
    from megatron.bridge.data.builders.gpt_sft import build_gpt_sft_split

    return build_gpt_sft_split(
        chat.path / file,
        tokenizer=tokenizer,
        seq_length=512,
        memmap_workers=1,
        seed=1,
        packed_sequence_size=512,
        pad_seq_to_mult=4,
        dataset_kwargs={"pad_to_max_length": True},
    )


def test_megatron_bridge_sees_each_conversation_and_its_answers(chat, tokenizers):
    """From the batches of Bridge's own dataset back to the conversations: inputs, targets, borders and loss."""
    loaded = load_tokenizer(tokenizers / "difference")
    tokenizer = SimpleNamespace(eos_id=loaded.eos_token_id, eod=loaded.eos_token_id, bos_id=1, pad_id=0)
    converter = ChatConverter(loaded, np.uint16, 1000)
    expected = sorted((d.tokens.tolist(), d.mask.tolist()) for d in converter.convert(chat.rows))
    found, targets = [], 0
    for file in ("training.idx.parquet", "validation.idx.parquet"):
        dataset = bridge_dataset(chat, file, tokenizer)
        for number in range(len(dataset)):
            batch = dataset.collate_fn([dataset[number]])
            assert batch["tokens"].shape == (1, 512)
            targets += int(batch["loss_mask"].sum())
            borders = batch["cu_seqlens_q_padded"][0].tolist()
            tokens, labels, loss, positions = (
                batch[name][0].tolist() for name in ("tokens", "labels", "loss_mask", "position_ids")
            )
            for start, stop in itertools.pairwise(borders):
                assert (stop - start) % 4 == 0
                if set(tokens[start:stop]) == {loaded.eos_token_id}:
                    assert not any(loss[start:stop])  # fills the row
                    continue
                assert positions[start:stop] == list(range(stop - start))
                # the last token of a conversation is a label only
                ids, mask = [tokens[start], *labels[start:stop]], [0, *loss[start:stop]]
                while ids[-2:] == [loaded.eos_token_id] * 2 or (ids[-1] == loaded.eos_token_id and not mask[-1]):
                    ids.pop(), mask.pop()
                found.append((ids, mask))
    assert sorted(found) == expected
    assert targets == sum(sum(mask) for _, mask in expected)
    figures = chat.info.extra
    assert targets == figures["training"]["targets"] + figures["validation"]["targets"]
    assert figures["training"]["targets_after_eos"] == 0
    assert figures["validation"]["conversations"] == 12
    assert figures["training"]["filled"] > 0.85


def test_what_stands_in_the_directory(chat):
    assert {path.name for path in chat.path.iterdir()} == {
        "dataset.json",
        "packing_metadata.json",
        "tokenizer",
        "training.idx.parquet",
        "validation.idx.parquet",
    }
    info = sft_info(chat.path)
    assert dataclasses.asdict(info) == json.loads((chat.path / "dataset.json").read_text())
    assert (info.documents, info.seq_length, info.pad_multiple, info.kind) == (60, 512, 4, "chat")
    assert [(row["line"], row["reason"]) for row in info.bad_rows] == [(21, "no turn of the assistant")]
    assert load_tokenizer(chat.path / "tokenizer").chat_template
    assert {path.name for path in chat.path.parent.iterdir()} == {"chat.jsonl", "out"}


def test_the_same_bytes_again_and_other_rows_with_another_seed(chat, tokenizers, tmp_path):
    def training(name, **options):
        prepare_chat([chat.source], tokenizers / "difference", tmp_path / name, seq_length=512, **options)
        return tmp_path / name / "training.idx.parquet"

    first, again, other = training("a"), training("b", workers=2), training("c", seed=7)
    assert first.read_bytes() == again.read_bytes()
    rows, shuffled = (pyarrow.parquet.read_table(path)["input_ids"].to_pylist() for path in (first, other))
    assert rows != shuffled and sorted(map(len, rows)) != []
    assert sorted(token for row in rows for token in row) == sorted(token for row in shuffled for token in row)
    assert not (tmp_path / "a" / "validation.idx.parquet").exists()


def test_targets_that_megatron_bridge_drops_are_told(tokenizers, tmp_path, write_jsonl):
    loaded = load_tokenizer(tokenizers / "plain")
    loaded.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + '<eos>' }}"
        "{% else %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
    )
    loaded.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": row["messages"][-2:]} for row in conversations(5)]
    info = prepare_chat([write_jsonl("a.jsonl", rows)], tmp_path / "tokenizer", tmp_path / "out", seq_length=512)
    # the first token of each answer stands right behind the question's eos
    assert info.extra["training"]["targets_after_eos"] == 5


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"seq_length": 510, "pad_multiple": 4}, UserError, "must be a multiple of 4"),
        ({"seq_length": 8}, JobError, "all 61 rows are bad, the first in .* tokens, more than 9"),
        ({"seq_length": 512, "validation_share": 1.0}, UserError, "at least 0 and below 1"),
        ({"seq_length": 512, "validation_share": 0.999}, JobError, "all 60 conversations are held out"),
    ],
)
def test_unusable_options(options, error, problem, chat, tokenizers, tmp_path):
    with pytest.raises(error, match=problem):
        prepare_chat([chat.source], tokenizers / "difference", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_text_is_no_chat(tokenizers, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is text"):
        prepare_chat([tmp_path / "a.txt"], tokenizers / "marked", tmp_path / "out", seq_length=64)
