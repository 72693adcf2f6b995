"""One unit of work tokenized: a small indexed dataset, and a report of its rows."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from falcon_bridge.data.documents import Converter, Document
from falcon_bridge.data.rows import BadRow, Lines, Row, read_rows
from falcon_bridge.data.units import Source, Unit


_BATCH_ROWS, _BATCH_CHARACTERS = 256, 1 << 20


@dataclass
class SegmentReport:
    """What became of the rows of one segment.

    Attributes:
        source: index into the sources.
        lines: how many it has; those of the segments after it in the same source count on from there.
        blank: of these, empty ones.
        documents: made of its rows.
        bad: a line within the segment, from 1, and a reason, for each row left out.
    """

    source: int
    lines: int = 0
    blank: int = 0
    documents: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class PartReport:
    """What became of one unit.

    Attributes:
        segments: in order.
        tokens: written.
        max_token_id: the largest one; -1 where there is none.
        kept: whether the part was written; not where more rows were bad than the job allows.
    """

    segments: list[SegmentReport]
    tokens: int = 0
    max_token_id: int = -1
    kept: bool = True


def part_prefix(work: Path, number: int) -> Path:
    """The prefix of the files of a part."""
    return work / f"part-{number:06d}"


def mask_prefix(prefix: Path) -> Path:
    """The prefix of the masks beside tokens."""
    return prefix.with_name(f"{prefix.name}.mask")


def read_part(work: Path, number: int) -> PartReport | None:
    """The report of a part that is done; None where it is not."""
    path = Path(f"{part_prefix(work, number)}.json")
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    segments = [
        SegmentReport(**{**segment, "bad": [tuple(bad) for bad in segment["bad"]]}) for segment in values["segments"]
    ]
    return PartReport(segments, values["tokens"], values["max_token_id"])


def write_part(
    work: Path,
    number: int,
    sources: list[Source],
    unit: Unit,
    converter: Converter,
    *,
    text_lines: bool,
    max_bad_rows: int,
) -> PartReport:
    """Tokenize a unit. Its report is written last: where it is there, the part is whole.

    Args:
        work: directory of the parts.
        number: of the unit.
        sources: all of the job.
        unit: the stretches to read.
        converter: makes documents of rows.
        text_lines: a text file has a document a line.
        max_bad_rows: stop, and keep nothing, at more than these.

    Returns:
        The report.
    """
    prefix = part_prefix(work, number)
    report = PartReport([])
    with ExitStack() as stack:
        tokens = stack.enter_context(_Builder(prefix, converter.dtype))
        masks = stack.enter_context(_Builder(mask_prefix(prefix), np.uint8)) if converter.masked else None
        for segment in unit:
            lines, found = Lines(), SegmentReport(segment.source)
            report.segments.append(found)
            rows = read_rows(
                sources[segment.source],
                segment,
                lines,
                text_key=converter.text_key,
                text_lines=text_lines,
                columns=converter.columns,
            )
            for line, document in _documents(rows, converter):
                if isinstance(document, BadRow):
                    found.bad.append((line, str(document)))
                    if sum(len(each.bad) for each in report.segments) > max_bad_rows:
                        report.kept = False
                        return report
                    continue
                found.documents += 1
                report.tokens += len(document.tokens)
                report.max_token_id = max(report.max_token_id, int(document.tokens.max()))
                tokens.add(document.tokens)
                if masks is not None:
                    masks.add(document.mask)
            found.lines, found.blank = lines.total, lines.blank
        for builder in (tokens, masks):
            if builder is not None:
                builder.finish()
    partial = Path(f"{prefix}.json.partial")
    partial.write_text(json.dumps(asdict(report)))
    os.replace(partial, f"{prefix}.json")
    return report


def _documents(rows: Iterator[Row], converter: Converter) -> Iterator[tuple[int, Document | BadRow]]:
    """Lines and what became of them, converted many at a time, in order."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += _characters(row.value)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield from _converted(batch, converter)
            batch, characters = [], 0
    yield from _converted(batch, converter)


def _characters(value: Any) -> int:
    return sum(len(text) for text in value.values() if isinstance(text, str)) if isinstance(value, dict) else 0


def _converted(batch: list[Row], converter: Converter) -> Iterator[tuple[int, Document | BadRow]]:
    good = iter(converter.convert([row.value for row in batch if not isinstance(row.value, BadRow)]))
    for row in batch:
        yield row.line, row.value if isinstance(row.value, BadRow) else next(good)


class _Builder:
    """Megatron Core's builder of an indexed dataset; what it leaves unfinished is removed."""

    def __init__(self, prefix: Path, dtype: type[np.number]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._paths = [f"{prefix}.bin", f"{prefix}.idx"]
        self._builder = IndexedDatasetBuilder(self._paths[0], dtype=dtype)
        self._finished = False

    def add(self, values: np.ndarray) -> None:
        """Add one document."""
        self._builder.add_document(values, [len(values)])

    def finish(self) -> None:
        """Write the index."""
        self._builder.finalize(self._paths[1])
        self._finished = True

    def __enter__(self) -> "_Builder":
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._finished:
            self._builder.data_file.close()
            for path in self._paths:
                Path(path).unlink(missing_ok=True)
