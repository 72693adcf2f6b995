import json
import subprocess
import sys

import pytest

from falcon_bridge.errors import JobError


VERBS = [
    ["demo"],
    ["verify"],
    ["train"],
    ["generate"],
    ["models"],
    ["recipes"],
    ["convert", "import"],
    ["convert", "export"],
    ["convert", "roundtrip"],
    ["launch"],
]
PATCHED = "falcon_bridge.conversion.importer.import_checkpoint"


def _lines(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("verb", VERBS, ids="-".join)
def test_help_has_an_example(run, verb):
    result = run(*verb, "--help")
    assert result.exit_code == 0 and f"falcon-bridge {' '.join(verb)}" in result.stdout
    assert "Example" in result.stdout and "--json" in result.stdout and "--debug" in result.stdout


@pytest.mark.parametrize("group", [[], ["convert"]], ids=["all", "convert"])
def test_help_of_a_group_has_examples(run, group):
    result = run(*group, "--help")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "Examples" in text and "falcon-bridge convert import tiiuae/" in text
    assert ("130 where Ctrl-C" in text) == (not group)


def test_the_command_starts_without_torch_and_megatron():
    code = (
        "import sys; import falcon_bridge.cli.app; "
        "sys.exit([m for m in ('torch', 'megatron.core', 'megatron.bridge', 'transformers') if m in sys.modules] or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_run_as_a_module():
    result = subprocess.run([sys.executable, "-m", "falcon_bridge", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("falcon-bridge 0.")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["convrt"], "Did you mean 'convert'?"),
        (["convert", "import"], "Missing argument"),
        (["models", "--jsn"], "No such option"),
        (["verify", "x", "--tp", "0"], "--tp"),
        (["verify", "x", "--tp", "two"], "--tp"),
    ],
)
def test_unusable_arguments_are_one_line_and_exit_2(run, args, text):
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = _lines(result.stderr)
    assert line.startswith("error: ") and text in line


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (JobError("no luck"), 1, "no luck"),
        (OSError(28, "No space left on device", "/x"), 1, "no space left on the device"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied: /x"),
        (KeyError("a\nb"), 1, "(--debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failed_job_is_one_line(run, monkeypatch, error, status, text, tmp_path):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(PATCHED, fail)
    result = run("convert", "import", "x", tmp_path / "y", "--json")
    assert result.exit_code == status
    (line,) = _lines(result.stderr)
    assert line.startswith("error: ") and text in line
    assert json.loads(result.stdout) == {"ok": False, "error": line.removeprefix("error: ")}


def test_debug_shows_the_traceback(run, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise JobError("no luck")

    monkeypatch.setattr(PATCHED, fail)
    result = run("convert", "import", "x", tmp_path / "y", "--debug")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "error: no luck" in result.stderr
