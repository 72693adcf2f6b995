"""Rows of a unit of work, good and bad, each with the line it stands on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from falcon_bridge.data.units import ARROW, PARQUET, TEXT, Segment, Source, load_arrow, open_lines
from falcon_bridge.errors import JobError, one_line


class BadRow(ValueError):
    """A row that cannot be used; the message says why, in a few words."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        line: number within the segment, from 1: lines of text and JSONL files, rows of others.
        value: what the row holds (the text of a text file as ``{text_key: …}``), or the `BadRow` that it is.
    """

    line: int
    value: dict[str, Any] | BadRow


@dataclass
class Lines:
    """How many lines a segment has, known once its rows are read.

    Attributes:
        total: all of them.
        blank: of these, empty lines, which are no rows.
    """

    total: int = 0
    blank: int = 0


def read_rows(
    source: Source,
    segment: Segment,
    lines: Lines,
    *,
    text_key: str,
    text_lines: bool,
    columns: list[str] | None = None,
) -> Iterator[Row]:
    """The rows of a segment, in order.

    Args:
        source: where it is from.
        segment: the stretch.
        lines: counted up while reading.
        text_key: the key that the text of a text file gets.
        text_lines: a text file has a document a line, instead of being one.
        columns: read only these of Parquet and Arrow.

    Raises:
        JobError: the file is damaged.
    """
    if source.kind in (PARQUET, ARROW):
        tables = _parquet(source, segment, columns) if source.kind == PARQUET else _arrow(source, segment, columns)
        for batch in tables:
            for value in batch.to_pylist():
                lines.total += 1
                yield Row(lines.total, value)
    elif source.kind == TEXT and not text_lines:
        with open(source.path, "rb") as stream:
            content = stream.read()
        lines.total = 1
        yield Row(1, _decoded(content, text_key))
    else:
        for line in _lines(source, segment):
            lines.total += 1
            if not line.strip():
                lines.blank += 1
            elif source.kind == TEXT:
                yield Row(lines.total, _decoded(line.rstrip(b"\r\n"), text_key))
            else:
                yield Row(lines.total, _parsed(line))


def _lines(source: Source, segment: Segment) -> Iterator[bytes]:
    """The lines that begin in the segment, the last one to its end even where that is in the next segment."""
    with open_lines(source) as stream:
        position = segment.start
        if position:
            # where the byte before is a line's end, a line begins here
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        compressed = source.kind not in (TEXT, "jsonl")
        try:
            while (compressed or position < segment.stop) and (line := stream.readline()):
                position += len(line)
                yield line
        except (OSError, EOFError) as error:
            raise JobError(f"{source.path} is damaged ({one_line(error)}): copy it again") from error


def _decoded(content: bytes, text_key: str) -> dict[str, Any] | BadRow:
    try:
        return {text_key: content.decode()}
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start})")


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON ({getattr(error, 'msg', 'nested too deeply')})")
    return value if isinstance(value, dict) else BadRow(f"a JSON {type(value).__name__} instead of an object a line")


def _parquet(source: Source, segment: Segment, columns: list[str] | None) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            if present == []:
                # rows without the column are bad ones, each of them
                present = file.schema_arrow.names[:1]
            groups = range(segment.start, segment.stop)
            yield from file.iter_batches(batch_size=1024, row_groups=groups, columns=present)
    except (OSError, ValueError) as error:
        raise JobError(f"{source.path} is damaged ({one_line(error)}): copy it again") from error


def _arrow(source: Source, segment: Segment, columns: list[str] | None) -> Iterator[Any]:
    dataset = load_arrow(source.path)
    if columns is not None:
        present = [name for name in columns if name in dataset.column_names]
        dataset = dataset.select_columns(present or dataset.column_names[:1])
    dataset = dataset.with_format("arrow")
    for start in range(segment.start, segment.stop, 1024):
        yield dataset[start : min(start + 1024, segment.stop)]
