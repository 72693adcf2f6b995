"""Text to indexed datasets: every token, in order, however many processes and however often it was killed."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from falcon_bridge.data import units, workers
from falcon_bridge.data.info import text_info
from falcon_bridge.data.prepare import prepare_text
from falcon_bridge.demo.text import python_reference
from falcon_bridge.errors import JobError, UserError


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "_MIN_UNIT_BYTES", 20_000)


@pytest.fixture
def corpus(write_jsonl):
    """Two files of about 15 units together, with three bad rows in the second."""
    documents = python_reference().train
    rows = [{"text": text} for text in documents]
    rows[40:40] = ["{broken", "", {"text": 7}]
    first = write_jsonl("a.jsonl", rows[:30])
    return [first, write_jsonl("b.jsonl", [*rows[30:], {"body": "x"}])], documents


def content(prefix):
    return {suffix: prefix.with_name(f"{prefix.name}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")}


def test_every_token_of_every_document(corpus, tokenizers, tokenizer, tmp_path):
    files, documents = corpus
    seen = []
    info = prepare_text(
        files, tokenizers / "plain", tmp_path / "new" / "x", workers=2, progress=lambda *step: seen.append(step)
    )
    data = IndexedDataset(str(tmp_path / "new" / "x"))
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents]
    assert [list(data[number]) for number in range(len(data))] == expected
    assert list(data.document_indices) == list(range(len(documents) + 1))
    assert data.index.dtype is np.uint16
    assert info.documents == len(documents) and info.tokens == sum(map(len, expected))
    assert info.max_token_id == max(map(max, expected))
    assert text_info(tmp_path / "new" / "x") == info
    assert [(row["file"], row["line"]) for row in info.bad_rows] == [
        (str(files[1]), 11),
        (str(files[1]), 13),
        (str(files[1]), 45),
    ]
    assert [row["reason"].split(" (")[0] for row in info.bad_rows] == [
        "not JSON",
        "'text' is a int instead of text",
        "no 'text'",
    ]
    assert [(counts["documents"], counts["bad_rows"], counts["blank_lines"]) for counts in info.inputs] == [
        (30, 0, 0),
        (41, 3, 1),
    ]
    tokenized = [step for step in seen if step[0] == "tokenize"]
    assert [step[1] for step in tokenized] == list(range(1, tokenized[0][2] + 1)) and len(tokenized) > 8
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"x.bin", "x.idx", "x.json"}


def test_bos_and_wide_vocabularies(write_jsonl, tokenizers, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("falcon_bridge.data.prepare.vocabulary_size", lambda tokenizer: 70_000)
    path = write_jsonl("a.jsonl", [{"content": "def"}])
    prepare_text([path], tokenizers / "plain", tmp_path / "x", text_key="content", bos=True)
    data = IndexedDataset(str(tmp_path / "x"))
    assert data.index.dtype is np.int32
    assert list(data[0]) == [
        tokenizer.bos_token_id,
        *tokenizer("def", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_a_job_killed_twice_has_the_bytes_of_one_run(corpus, tokenizers, tmp_path):
    files, _ = corpus
    prepare_text(files, tokenizers / "plain", tmp_path / "once" / "x", workers=1)
    out = tmp_path / "killed" / "x"
    work = out.with_name("x.partial")

    def run():
        # its parts come one by one, so that the kill is in the middle
        prepare_text(files, tokenizers / "plain", out, workers=2, progress=lambda *step: time.sleep(0.05))

    for parts in (2, 6):
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        while len(list(work.glob("part-*.json"))) < parts and process.is_alive():
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is at work"):
            prepare_text(files, tokenizers / "plain", out)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not any(out.with_name(f"x.{suffix}").exists() for suffix in ("bin", "idx", "json"))
        time.sleep(0.2)  # a worker that outlived its parent would go on writing
        before = sorted(path.name for path in work.iterdir())
        time.sleep(0.3)
        assert sorted(path.name for path in work.iterdir()) == before
    taken_up = list(work.glob("part-*.json"))
    times = {path: path.stat().st_mtime_ns for path in taken_up}
    again = []

    def note(stage, done, total, remark):
        again.append(stage)
        assert all(path.stat().st_mtime_ns == times[path] for path in taken_up if work.exists())

    prepare_text(files, tokenizers / "plain", out, workers=2, progress=note)
    assert content(out) == content(tmp_path / "once" / "x")
    assert not work.exists() and len(taken_up) >= 6


def test_another_job_in_the_same_place(corpus, tokenizers, tmp_path):
    files, _ = corpus

    def stop(stage, done, total, note):
        raise KeyboardInterrupt

    before = multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt):
        prepare_text(files, tokenizers / "plain", tmp_path / "x", progress=stop)
    assert (tmp_path / "x.partial").is_dir()
    assert set(multiprocessing.active_children()) <= set(before)
    with pytest.raises(UserError, match="unfinished job with other inputs or options"):
        prepare_text(files[:1], tokenizers / "plain", tmp_path / "x")
    info = prepare_text(files[:1], tokenizers / "plain", tmp_path / "x", force=True)
    assert info.documents == 30 and len(IndexedDataset(str(tmp_path / "x"))) == 30
    with pytest.raises(UserError, match=r"x\.bin exists"):
        prepare_text(files, tokenizers / "plain", tmp_path / "x")


def test_too_many_bad_rows(corpus, tokenizers, tmp_path):
    files, _ = corpus
    with pytest.raises(JobError, match=r"more than 2 bad rows .*, the first in .*b\.jsonl, line 11: not JSON"):
        prepare_text(files, tokenizers / "plain", tmp_path / "x", workers=2, max_bad_rows=2)
    assert not (tmp_path / "x.bin").exists()
    assert prepare_text(files, tokenizers / "plain", tmp_path / "x", max_bad_rows=3).documents == 71


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "the input has no rows"),
        (["", " "], "the input has no rows"),
        ([{"txt": "a"}, {"text": ""}, {"text": "\ud800"}], r"all 3 rows are bad, the first in .*, line 1: no 'text'"),
    ],
)
def test_nothing_to_write(rows, problem, write_jsonl, tokenizers, tmp_path):
    path = write_jsonl("a.jsonl", rows)
    with pytest.raises(JobError, match=problem):
        prepare_text([path], tokenizers / "plain", tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_worker(corpus, tokenizers, tmp_path, monkeypatch):
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "write_part", die)
    with pytest.raises(JobError, match="a worker was killed"):
        prepare_text(corpus[0], tokenizers / "plain", tmp_path / "x", workers=2)
    assert list(tmp_path.glob("x*")) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer"),
        (
            lambda path: (path / "tokenizer_config.json").write_text(
                json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
            ),
            "has no eos_token",
        ),
    ],
)
def test_unusable_tokenizers(damage, problem, write_jsonl, tokenizers, tmp_path):
    import shutil

    shutil.copytree(tokenizers / "plain", tmp_path / "tokenizer")
    damage(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=problem):
        prepare_text([write_jsonl("a.jsonl", [{"text": "a"}])], tmp_path / "tokenizer", tmp_path / "x")
