import difflib
import re
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


_MAX_LENGTH = 200
_TRACEBACK = "Traceback (most recent call last)"
_CPP_FRAMES = re.compile(
    r"Exception raised from |frame #\d+: |C\+\+ CapturedTraceback|\*\*\* Check failure stack trace"
)


def one_line(error: BaseException) -> str:
    """`error` as one line: ``ValueError: message`` with line breaks and repeated blanks folded.

    Of the errors of others (not a `FalconBridgeError`) tracebacks and C++ frames in the message are left out, and
    what is longer than 200 characters is cut.
    """
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return "no space left on the device: free some, or write somewhere else"
    if isinstance(error, FalconBridgeError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if _TRACEBACK in text:
        # torch's checkpoint errors are the tracebacks of their ranks; the cause is the first line that has no indent
        lines = str(error).partition(_TRACEBACK)[2].splitlines()[1:]
        cause = next((line for line in lines if line.strip() and not line[0].isspace()), "")
        return _cut(cause or text.partition(_TRACEBACK)[0])
    text = _CPP_FRAMES.split(text)[0].strip()
    return _cut(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def message_of(error: BaseException) -> str:
    """The message of an error that was written for the user, on one line; `one_line` where it has none."""
    return " ".join(str(error).split()) or one_line(error)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 1].rstrip() + "…"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` for the closest of `known`, or an empty string where nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean '{matches[0]}'?" if matches else ""
