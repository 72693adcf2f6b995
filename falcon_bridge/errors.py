import difflib
from collections.abc import Iterable


class FalconBridgeError(Exception):
    """An error whose message is one line that says what went wrong and what to change.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class UserError(FalconBridgeError):
    """What the user gave cannot be used: a path, an option, a checkpoint, a recipe name."""

    exit_code = 2


class JobError(FalconBridgeError):
    """The arguments were fine, but the job failed or found a mismatch."""


def one_line(error: BaseException) -> str:
    """`error` as one line: ``ValueError: message`` with line breaks and repeated blanks folded."""
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return "no space left on the device: free some, or write somewhere else"
    if isinstance(error, FalconBridgeError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` for the closest of `known`, or an empty string where nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean '{matches[0]}'?" if matches else ""
