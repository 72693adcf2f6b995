"""Inputs cut into units of work: the same cut however many workers there are."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from falcon_bridge.errors import UserError, one_line


TEXT, JSONL, GZIP, PARQUET, ARROW = "text", "jsonl", "jsonl.gz", "parquet", "arrow"
_SUFFIXES = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": JSONL,
    ".json": JSONL,
    ".ndjson": JSONL,
    ".jsonl.gz": GZIP,
    ".json.gz": GZIP,
    ".ndjson.gz": GZIP,
    ".parquet": PARQUET,
    ".pq": PARQUET,
}
_MIN_UNIT_BYTES, _MAX_UNITS, _MAX_TEXT_BYTES = 8 << 20, 4096, 1 << 30
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Source:
    """One input file, or one split of a saved Hugging Face dataset.

    Attributes:
        path: the file, or the directory for ``datasets.load_from_disk``.
        kind: how it is read.
        size: bytes.
        mtime: when it was last changed, in ns.
    """

    path: str
    kind: str
    size: int
    mtime: int


@dataclass(frozen=True)
class Segment:
    """A stretch of one source.

    Attributes:
        source: index into the sources.
        start: first byte (of text and JSONL), row group (Parquet) or row (Arrow).
        stop: one past the last.
    """

    source: int
    start: int
    stop: int


Unit = tuple[Segment, ...]
"""What one worker does at a time: consecutive segments."""


def find_sources(inputs: Iterable[str | Path], split: str | None = None) -> list[Source]:
    """The files behind what the user gave, in an order that depends on their names only.

    Args:
        inputs: text (``.txt``, ``.md``), JSON Lines (``.jsonl``, ``.json``, ``.ndjson``, plain or ``.gz``) and Parquet
            files, directories of them, and directories that ``datasets.save_to_disk`` wrote.
        split: take only this split of a directory that has several.

    Raises:
        UserError: one is missing, empty of such files, of an unknown kind, or has splits to choose from.
    """
    sources = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"{path} does not exist: give files or directories of text, JSON Lines or Parquet")
        if path.is_dir():
            sources += _directory(path, split)
        else:
            kind = _kind(path)
            if kind is None:
                raise UserError(f"{path} is of an unknown kind: give {', '.join(sorted(_SUFFIXES))} files")
            sources.append(_source(path, kind))
    if not sources:
        raise UserError("no input: give files or directories of text, JSON Lines or Parquet")
    twice = [path for path, count in Counter(source.path for source in sources).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice: leave one out")
    return sources


def cut(sources: list[Source], *, text_lines: bool = False) -> list[Unit]:
    """Cut sources into units of about equal size; gzip files and text files of one document stay whole.

    Args:
        sources: see `find_sources`.
        text_lines: a text file has a document a line.

    Returns:
        Units in the order of the sources.

    Raises:
        UserError: a Parquet file or saved dataset cannot be read.
    """
    target = max(_MIN_UNIT_BYTES, sum(source.size for source in sources) // _MAX_UNITS)
    units, unit, filled = [], [], 0
    for number, source in enumerate(sources):
        for start, stop, size in _stretches(source, target, text_lines):
            if unit and filled + size > target:
                units.append(tuple(unit))
                unit, filled = [], 0
            unit.append(Segment(number, start, stop))
            filled += size
    return [*units, tuple(unit)] if unit else units


def _stretches(source: Source, target: int, text_lines: bool) -> Iterator[tuple[int, int, int]]:
    """Starts, stops and sizes in bytes of stretches of at most about `target` bytes."""
    if source.kind == JSONL or (source.kind == TEXT and text_lines):
        for start in range(0, source.size, target):
            stop = min(start + target, source.size)
            yield start, stop, stop - start
    elif source.kind == PARQUET:
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_metadata(source.path)
        except Exception as error:
            raise UserError(f"{source.path} is not a Parquet file ({one_line(error)}): copy it again") from error
        for group in range(metadata.num_row_groups):
            yield group, group + 1, metadata.row_group(group).total_byte_size
    elif source.kind == ARROW:
        rows = len(load_arrow(source.path))
        step = max(1, rows * target // max(source.size, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, source.size * (stop - start) // rows
    elif source.kind == TEXT and source.size > _MAX_TEXT_BYTES:
        raise UserError(
            f"{source.path} would be one document of {source.size / 1e9:.1f} GB: use --text-lines for one a line"
        )
    elif source.size:
        yield 0, source.size, source.size


def load_arrow(path: str):
    """The ``datasets.Dataset`` that ``save_to_disk`` wrote to `path`, memory-mapped.

    Raises:
        UserError: it cannot be read.
    """
    import datasets

    try:
        return datasets.load_from_disk(path)
    except Exception as error:
        raise UserError(f"{path} is not a saved dataset ({one_line(error)}): save it again") from error


def open_lines(source: Source):
    """The bytes of a text or JSONL source, decompressed."""
    return gzip.open(source.path, "rb") if source.kind == GZIP else open(source.path, "rb")


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return _SUFFIXES.get("".join(suffixes[-2:])) or _SUFFIXES.get("".join(suffixes[-1:]))


def _source(path: Path, kind: str) -> Source:
    stat = path.stat()
    return Source(str(path), kind, stat.st_size, stat.st_mtime_ns)


def _directory(path: Path, split: str | None) -> list[Source]:
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return [_saved(path / _choose(path, names, split))]
    if (path / "state.json").is_file():
        return [_saved(path)]
    files = sorted(file for file in path.rglob("*") if _is_data(file, path))
    if not files:
        raise UserError(f"{path} has no {', '.join(sorted(_SUFFIXES))} files")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if len(by_split) > 1 or (split is not None and None not in by_split):
        files = by_split[_choose(path, [name for name in by_split if name], split)]
    return [_source(file, _kind(file)) for file in files]


def _is_data(file: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(root).parts)
    # beside the data of a saved or downloaded dataset, its description
    described = file.name in ("dataset_info.json", "dataset_infos.json", "README.md")
    return file.is_file() and not hidden and not described and _kind(file) is not None


def _saved(path: Path) -> Source:
    files = sorted(path.glob("*.arrow"))
    if not files:
        raise UserError(f"{path} has no .arrow files: save the dataset again")
    stats = [file.stat() for file in files]
    return Source(str(path), ARROW, sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats))


def _split_of(path: Path) -> str | None:
    """The split that a path of a hub dataset names, as the hub reads it: ``data/train-00000-of-00003.parquet``."""
    words = [word for part in path.parts for word in re.split(r"[-_.\s]", part.lower())]
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)


def _choose(path: Path, names: list[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        problem = "has several splits" if split is None else f"has no split '{split}'"
        raise UserError(f"{path} {problem}: choose one with --split, of {', '.join(sorted(names))}")
    return split
