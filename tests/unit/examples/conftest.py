"""Runs the examples as they are, but every ``falcon-bridge`` and ``python`` in a fork of this process.

Importing Megatron Bridge takes 12 to 30 s, and the examples' commands are some thirty processes: it is imported once.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[3] / "examples"
_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(int(server.recv(8) or b"70"))
"""
_MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("falcon_h1", "llama")]
_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclasses.dataclass
class Finished:
    """What an example did."""

    status: int
    stdout: str
    stderr: str


class Examples:
    """Executes an example with the commands on its PATH answered here.

    Args:
        directory: for those commands and their socket; a short path.
    """

    def __init__(self, directory: Path) -> None:
        self._address = str(directory / "socket")
        self._bin = directory / "bin"
        self._bin.mkdir()
        for command in ("falcon-bridge", "python"):
            client = self._bin / command
            client.write_text(_CLIENT.format(python=sys.executable, address=self._address))
            client.chmod(0o755)

    def __call__(self, command: list[str | Path], cwd: Path, **environment: str) -> Finished:
        """Run `command`, ``bash`` or ``python`` and a file, in `cwd`."""
        kept = {name: value for name, value in os.environ.items() if name not in _RANKS}
        kept |= {"PATH": f"{self._bin}:{kept['PATH']}", "COLUMNS": "200", **environment}
        with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
            server.bind(self._address)
            stack.callback(os.unlink, self._address)
            server.listen()
            stdout, stderr = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            process = subprocess.Popen([str(word) for word in command], cwd=cwd, env=kept, **streams)
            try:
                ended = os.pidfd_open(process.pid)
                stack.callback(os.close, ended)
                while ended not in (ready := select.select([server, ended], [], [])[0]):
                    assert ready == [server]
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(str(_serve(connection)).encode())
            finally:
                process.kill()
                process.wait()
            stdout.seek(0)
            stderr.seek(0)
            return Finished(process.returncode, stdout.read(), stderr.read())


def _serve(connection: socket.socket) -> int:
    """Do what a client asks in a fork, on the client's own streams; its exit status."""
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = b""
    while len(request) < int.from_bytes(header, "big"):
        request += connection.recv(1 << 20)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _execute(streams, *json.loads(request))
        finally:
            os._exit(status)
    for stream in streams:
        os.close(stream)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise


def _execute(streams: list[int], program: str, arguments: list[str], cwd: str, environment: dict[str, str]) -> int:
    import torch
    from megatron.core.tensor_parallel import random

    from falcon_bridge.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # another test may have left one in pytest's process
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
    try:
        if program == "falcon-bridge":
            sys.argv = [program, *arguments]
            main()
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


@pytest.fixture(scope="session")
def examples() -> Iterator[Examples]:
    from falcon_bridge.training.run import preload

    preload()
    for module in ("matplotlib.figure", "peft", "pyarrow.parquet", *_MODELS):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="examples_") as directory:
        yield Examples(Path(directory))
