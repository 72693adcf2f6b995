import json
import logging
import os
import subprocess
import sys

import pytest
import typer

from falcon_bridge.cli.session import session


def _chatter():
    print("python chatter")
    os.write(1, b"C++ chatter\n")
    subprocess.run(["echo", "child chatter"], check=True)
    logging.getLogger("megatron").warning("logged chatter")


def test_json_is_alone_on_stdout(capfd):
    with session(json=True, debug=True) as current:
        _chatter()
        current.show("a table")
        current.finish({"ok": True, "loss": float("nan"), "nested": [{"value": float("inf")}], "path": object})
        print("late chatter")
    out, err = capfd.readouterr()
    assert json.loads(out) == {"ok": True, "loss": None, "nested": [{"value": None}], "path": str(object)}
    for text in ("python chatter", "C++ chatter", "child chatter", "a table", "late chatter"):
        assert text in err


def test_without_json_stdout_has_the_results_and_stderr_no_chatter(capfd):
    with session(json=False, debug=False) as current:
        _chatter()
        current.show("a table")
        current.finish({"ok": True})
    out, err = capfd.readouterr()
    assert out == "a table\n" and err == ""


def test_streams_are_restored_after_an_error(capfd):
    stdout, stderr = sys.stdout, sys.stderr
    with pytest.raises(ValueError), session(json=False, debug=False):
        raise ValueError
    os.write(1, b"out\n")
    os.write(2, b"err\n")
    assert (sys.stdout, sys.stderr) == (stdout, stderr) and capfd.readouterr() == ("out\n", "err\n")


def test_a_logging_handler_made_inside_survives(capfd):
    logger = logging.getLogger("test_session")
    with session(json=False, debug=False):
        handler = logging.StreamHandler()
        logger.addHandler(handler)
    try:
        logger.warning("after the session")
    finally:
        logger.removeHandler(handler)
    assert "after the session" in capfd.readouterr().err


def test_not_ok_exits_with_1(capfd):
    with pytest.raises(typer.Exit) as caught, session(json=True, debug=False) as current:
        current.finish({"ok": False})
    assert caught.value.exit_code == 1 and json.loads(capfd.readouterr().out) == {"ok": False}


def test_bars_of_a_failed_job_leave_no_trace(capfd):
    with pytest.raises(ValueError), session(json=False, debug=False) as current, current.progress() as progress:
        progress.add_task("converting", total=3, note="")
        raise ValueError
    assert capfd.readouterr() == ("", "")
