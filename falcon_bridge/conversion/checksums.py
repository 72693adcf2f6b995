"""SHA-256 sums beside a checkpoint's files: safetensors itself cannot tell a flipped bit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from falcon_bridge.errors import UserError


CHECKSUMS_NAME = "falcon_bridge.sha256.json"


def write_checksums(directory: Path) -> None:
    """Write the sums of all safetensors files of `directory` to ``falcon_bridge.sha256.json`` in it."""
    sums = {path.name: _sha256(path) for path in sorted(directory.glob("*.safetensors"))}
    (directory / CHECKSUMS_NAME).write_text(json.dumps(sums, indent=2) + "\n")


def verify_checksums(directory: Path, progress: Callable[[str], None] = lambda name: None) -> bool:
    """Compare the files of `directory` with its ``falcon_bridge.sha256.json``, where it has one.

    Args:
        directory: a Hugging Face checkpoint directory.
        progress: called with the name of each file that was compared.

    Returns:
        Whether there were sums to compare with.

    Raises:
        UserError: a file differs from its sum, is missing, or the sums cannot be read.
    """
    listing = directory / CHECKSUMS_NAME
    if not listing.is_file():
        return False
    try:
        sums = json.loads(listing.read_text())
        items = sorted((str(name), str(digest)) for name, digest in sums.items())
    except (ValueError, AttributeError):
        raise UserError(f"{listing} is not a JSON object of file sums: delete it or fetch it again") from None
    for name, digest in items:
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{listing} names {name}, which is not in {directory}: fetch the checkpoint again")
        if _sha256(path) != digest:
            raise UserError(
                f"{path} differs from its SHA-256 in {CHECKSUMS_NAME}: it was damaged or changed; fetch or export it "
                "again (if you changed it on purpose, delete that file)"
            )
        progress(name)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
