"""Rows of any cut of a file: each once, in order, on its line."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_bridge.data import units
from falcon_bridge.data.rows import BadRow, Lines, read_rows
from falcon_bridge.data.units import Segment, cut, find_sources
from falcon_bridge.errors import JobError, UserError


def read(paths, monkeypatch=None, *, bytes_a_unit=None, columns=None, text_lines=False, split=None):
    """All rows as (file name, line in the file, value)."""
    sources = find_sources(paths, split)
    if bytes_a_unit:
        monkeypatch.setattr(units, "_MIN_UNIT_BYTES", bytes_a_unit)
    found, before = [], dict.fromkeys(range(len(sources)), 0)
    work = cut(sources, text_lines=text_lines)
    for segment in (segment for unit in work for segment in unit):
        lines = Lines()
        rows = read_rows(
            sources[segment.source], segment, lines, text_key="text", text_lines=text_lines, columns=columns
        )
        for row in rows:
            found.append((segment.source, before[segment.source] + row.line, row.value))
        before[segment.source] += lines.total
    return found, work


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12), max_size=12),
    ending=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    width=st.integers(1, 40),
)
def test_a_cut_anywhere_loses_no_line(lines, ending, last, width, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    content = ending.join(lines) + (ending if last else "")
    path.write_bytes(content.encode())
    (source,) = find_sources([path])
    found, before, blank = [], 0, 0
    for start in range(0, source.size, width):
        count = Lines()
        segment = Segment(0, start, min(start + width, source.size))
        for row in read_rows(source, segment, count, text_key="text", text_lines=True):
            found.append((before + row.line, row.value["text"]))
        before, blank = before + count.total, blank + count.blank
    every = content.encode().split(b"\n")
    expected = [(number, line.rstrip(b"\r").decode()) for number, line in enumerate(every, 1) if line.strip()]
    assert found == expected
    assert before - blank == len(expected)


def test_jsonl_and_gzip_tell_every_bad_row(tmp_path):
    content = b'{"text": "a"}\n\n[1]\n{"text": \n{"text": "\xff"}\n  \n"b"\n{"text": "c"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as stream:
        stream.write(content)
    found, _ = read([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])
    for number in (0, 1):
        values = [(line, value) for source, line, value in found if source == number]
        assert [line for line, _ in values] == [1, 3, 4, 5, 7, 8]
        assert values[0][1] == {"text": "a"} and values[-1][1] == {"text": "c"}
        assert all(isinstance(value, BadRow) for _, value in values[1:-1])
        assert [str(value).split(" (")[0] for _, value in values[1:-1]] == [
            "a JSON list instead of an object a line",
            "not JSON",
            "not UTF-8",
            "a JSON str instead of an object a line",
        ]


def test_a_truncated_gzip_file_fails_the_job(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "abcdefgh"}\n' * 999)[:-20])
    with pytest.raises(JobError, match=r"a\.jsonl\.gz is damaged"):
        read([path])


def test_parquet_and_saved_datasets_have_the_same_rows(tmp_path, monkeypatch):
    rows = [{"text": f"row {number}" * (number % 7), "other": [number]} for number in range(2500)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list([])})
    saved.save_to_disk(str(tmp_path / "saved"))
    for path, split in ((tmp_path / "a.parquet", None), (tmp_path / "saved", "train")):
        found, work = read([path], monkeypatch, bytes_a_unit=4000, split=split)
        assert len(work) > 3
        assert [(line, value) for _, line, value in found] == list(enumerate(rows, 1))
        narrow, _ = read([path], columns=["text"], split=split)
        assert [value for *_, value in narrow] == [{"text": row["text"]} for row in rows]
        missing, _ = read([path], columns=["content"], split=split)
        assert len(missing) == 2500 and all("content" not in value for *_, value in missing)
    with pytest.raises(UserError, match="has several splits: choose one with --split, of test, train"):
        find_sources([tmp_path / "saved"])


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file"):
        read([tmp_path / "a.parquet"])


def test_small_files_share_a_unit_and_large_ones_have_several(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text("x" * 100)
    (tmp_path / "large.jsonl").write_text((json.dumps({"text": "y" * 80}) + "\n") * 100)
    found, work = read([tmp_path], monkeypatch, bytes_a_unit=1000)
    assert len(found) == 130
    assert 10 <= len(work) <= 14
    assert [source for source, *_ in found] == sorted(source for source, *_ in found)


def test_a_downloaded_dataset_has_splits_to_choose_from(tmp_path):
    for name in (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="has several splits"):
        find_sources([tmp_path])
    assert [source.path[-26:] for source in find_sources([tmp_path], "train")] == [
        "/train-00000-of-00002.jsonl"[-26:],
        "/train-00001-of-00002.jsonl"[-26:],
    ]
    with pytest.raises(UserError, match="has no split 'dev'"):
        find_sources([tmp_path], "dev")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("missing.jsonl", "does not exist"), ("a.csv", "of an unknown kind"), ("empty", "has no .*files")],
)
def test_unusable_inputs(name, problem, tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=problem):
        find_sources([tmp_path / name])


def test_the_same_file_twice(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="given twice"):
        find_sources([tmp_path, tmp_path / "a.txt"])
