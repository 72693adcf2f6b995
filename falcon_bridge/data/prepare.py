"""Text files to Megatron's indexed dataset."""

import gc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from falcon_bridge.data.documents import TextConverter
from falcon_bridge.data.info import DatasetInfo
from falcon_bridge.data.part import PartReport, part_prefix
from falcon_bridge.data.tokenizer import load_tokenizer, vocabulary_digest, vocabulary_size
from falcon_bridge.data.units import Source, cut, find_sources
from falcon_bridge.data.workers import NoDocument, Progress, bad_rows, work_directory, write_parts
from falcon_bridge.errors import UserError


_VERSION = 1
"""Of what a job's parts are; another version of them is not taken up again."""


def prepare_text(
    inputs: Iterable[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    text_key: str = "text",
    text_lines: bool = False,
    split: str | None = None,
    bos: bool = False,
    workers: int | None = None,
    max_bad_rows: int = 1000,
    force: bool = False,
    progress: Progress = lambda stage, done, total, note: None,
) -> DatasetInfo:
    """Tokenize text into ``OUT.bin`` and ``OUT.idx``, with a description of it in ``OUT.json``.

    Documents stand in the order of the inputs, each ended by the tokenizer's ``eos_token``, whatever the number of
    workers. A run that was stopped is taken up again by the same call, with the same bytes as the result of one run;
    until the end its work is in ``OUT.partial/``, and nothing is at the final names.

    Args:
        inputs: see `units.find_sources`.
        tokenizer: Hugging Face directory or hub id.
        out: prefix of the result.
        text_key: where JSON Lines, Parquet and datasets have their text.
        text_lines: a ``.txt`` or ``.md`` file has a document a line; else it is one document.
        split: of a dataset with several.
        bos: put the tokenizer's ``bos_token`` in front of each document.
        workers: processes; one a core where None.
        max_bad_rows: rows that cannot be used are left out and listed; the job fails at more than these.
        force: replace a result, or an unfinished job with other inputs.
        progress: told of every part.

    Returns:
        The description.

    Raises:
        UserError: an input, the tokenizer or the output cannot be used.
        JobError: too many bad rows, no document, or a damaged file.
    """
    out = Path(os.path.abspath(out))
    if out.suffix in (".bin", ".idx"):
        out = out.with_suffix("")
    for suffix in (".bin", ".idx", ".json"):
        if Path(f"{out}{suffix}").exists() and not force:
            raise UserError(f"{out}{suffix} exists: choose another --out, or replace it with --force")
    sources = find_sources(inputs, split)
    units = cut(sources, text_lines=text_lines)
    loaded = load_tokenizer(tokenizer)
    if bos and loaded.bos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer} has no bos_token: leave --bos out")
    dtype = token_dtype(vocabulary_size(loaded))
    job = {
        "version": _VERSION,
        "kind": "text",
        "vocabulary": vocabulary_digest(loaded),
        "text_key": text_key,
        "text_lines": text_lines,
        "bos": bos,
    }
    with work_directory(Path(f"{out}.partial"), job, sources, restart=force) as work:
        reports = write_parts(
            work,
            sources,
            units,
            TextConverter(loaded, dtype, text_key, bos),
            text_lines=text_lines,
            max_bad_rows=max_bad_rows,
            workers=worker_count(workers, len(units)),
            progress=progress,
        )
        info = describe("text", tokenizer, loaded, sources, reports)
        if not info.documents:
            raise no_document(info)
        progress("write", 0, 1, out.name)
        merge_parts([part_prefix(work, number) for number in range(len(reports))], work / "whole", dtype)
        info.bin_bytes = (work / "whole.bin").stat().st_size
        # the index last, and an old one gone first: at any moment it is whole or the dataset is not there
        Path(f"{out}.idx").unlink(missing_ok=True)
        os.replace(work / "whole.bin", f"{out}.bin")
        info.write(Path(f"{out}.json"))
        os.replace(work / "whole.idx", f"{out}.idx")
        progress("write", 1, 1, out.name)
    return info


def token_dtype(vocab_size: int) -> type[np.number]:
    """The type that Megatron Core stores tokens of such a vocabulary in."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def worker_count(workers: int | None, units: int) -> int:
    """How many processes to start: at most one a unit."""
    return max(1, min(workers or len(os.sched_getaffinity(0)), units))


def merge_parts(prefixes: list[Path], out: Path, dtype: type[np.number]) -> None:
    """Join indexed datasets into one, with Megatron Core's builder.

    Args:
        prefixes: in order.
        out: prefix of the result.
        dtype: of all.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    # the builder collects garbage after each part, which takes long where much is imported
    gc.freeze()
    try:
        builder = IndexedDatasetBuilder(f"{out}.bin", dtype=dtype)
        for prefix in prefixes:
            builder.add_index(str(prefix))
        builder.finalize(f"{out}.idx")
    finally:
        gc.unfreeze()


def describe(
    kind: str, path: str | Path, tokenizer: Any, sources: list[Source], reports: list[PartReport]
) -> DatasetInfo:
    """The description of what the parts of a job are together."""
    inputs = [{"file": source.path, "documents": 0, "bad_rows": 0, "blank_lines": 0} for source in sources]
    for segment in (segment for report in reports for segment in report.segments):
        counts = inputs[segment.source]
        counts["documents"] += segment.documents
        counts["bad_rows"] += len(segment.bad)
        counts["blank_lines"] += segment.blank
    return DatasetInfo(
        kind=kind,
        documents=sum(counts["documents"] for counts in inputs),
        tokens=sum(report.tokens for report in reports),
        max_token_id=max((report.max_token_id for report in reports), default=-1),
        tokenizer=str(Path(path).absolute()) if Path(path).exists() else str(path),
        vocabulary=vocabulary_digest(tokenizer),
        vocab_size=vocabulary_size(tokenizer),
        eod=tokenizer.eos_token_id,
        inputs=inputs,
        bad_rows=bad_rows(sources, reports),
    )


def no_document(info: DatasetInfo) -> NoDocument:
    """The error for inputs without a single good row."""
    if not info.bad_rows:
        return NoDocument(f"the input has no rows ({len(info.inputs)} files): give others")
    first = info.bad_rows[0]
    return NoDocument(
        f"all {len(info.bad_rows)} rows are bad, the first in {first['file']}, line {first['line']}: {first['reason']}"
    )
