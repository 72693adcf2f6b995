"""Directories that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from falcon_bridge.errors import JobError, UserError


@contextlib.contextmanager
def atomic_directory(target: str | Path, *, force: bool = False, bytes_needed: int = 0) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends without an exception.

    On any exception, Ctrl-C included, the directory and what was made for it are removed and `target` is as before.

    Args:
        target: the directory to make. Missing parents are made.
        force: replace `target` where it exists.
        bytes_needed: refuse before the block where the disk has less than this free.

    Raises:
        UserError: `target` exists and `force` is False, or `force` would remove the current directory or the home.
        JobError: the disk is too full.
    """
    target = Path(os.path.abspath(target))
    check_target(target, force=force)
    made = _make_parents(target.parent)
    partial = None
    try:
        free = shutil.disk_usage(target.parent).free
        if free < bytes_needed:
            raise JobError(f"{target} needs {_size(bytes_needed)} and {target.parent} has {_size(free)} free")
        # named before it is made, so that an interrupt in between leaves nothing behind
        partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        yield partial
        _swap(partial, target, force)
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def check_target(target: str | Path, *, force: bool) -> None:
    """Refuse a `target` that `atomic_directory` would refuse; to be called before long work.

    Raises:
        UserError: as for `atomic_directory`.
    """
    target = Path(os.path.abspath(target))
    if not os.path.lexists(target):
        return
    if not force:
        raise UserError(f"{target} exists: choose another output directory, or replace it with --force")
    for kept in (Path.cwd(), Path.home()):
        if is_inside(kept, target):
            raise UserError(f"--force would remove {target}, which holds {kept}: choose another output directory")


def is_inside(path: str | Path, directory: str | Path) -> bool:
    """Whether `path` is `directory` or below it, links followed; link loops are taken as they are."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def _swap(partial: Path, target: Path, force: bool) -> None:
    check_target(target, force=force)  # it may have been made meanwhile
    if not os.path.lexists(target):
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def _make_parents(parent: Path) -> list[Path]:
    """Make `parent`; return what had to be made, deepest first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{parent} is a file: choose another output directory") from None
    return missing


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
