"""The verbs put together, and what every verb does about errors."""

import json
import signal
import sys
import threading
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from falcon_bridge.errors import one_line


_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Group(TyperGroup):
    """Commands whose errors are one line on stderr and an exit status; ``--debug`` adds the traceback."""

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            status = super().main(args=args, prog_name=prog_name, standalone_mode=False, **extra)
        except (KeyboardInterrupt, typer.Abort):
            status = _report("interrupted", _INTERRUPTED, args)
        except Exception as error:
            status = _fail(error, args)
        else:
            status = status if isinstance(status, int) else 0
            if status == _INTERRUPTED:  # newer typer turns KeyboardInterrupt into Exit(130) itself
                _report("interrupted", status, args)
        if standalone_mode:
            sys.exit(status)
        return status


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(error: Exception, args: list[str]) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(error.format_message() + "\n")
        return 2
    if "--debug" in args:
        traceback.print_exception(error)
    if hasattr(error, "format_message"):  # an error of the command line itself
        return _report(error.format_message(), error.exit_code, args)
    status = getattr(error, "exit_code", 1)
    hint = "" if hasattr(error, "exit_code") or "--debug" in args else " (--debug shows the traceback)"
    return _report(one_line(error) + hint, status, args)


def _report(message: str, status: int, args: list[str]) -> int:
    message = " ".join(message.split())
    prefix = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    sys.stderr.write(f"{prefix} {message}\n")
    if "--json" in args:
        sys.stdout.write(json.dumps({"ok": False, "error": message}) + "\n")
    return status


_HELP = """Train Falcon-H1 on Megatron Bridge, and convert it to and from Hugging Face exactly.

[bold]Examples[/bold]

falcon-bridge demo

falcon-bridge convert import tiiuae/Falcon-H1-0.5B-Base ./megatron/falcon-h1-0.5b

falcon-bridge verify tiiuae/Falcon-H1-0.5B-Base --tp 2

falcon-bridge train --recipe falcon_h1_tiny_cpu_pretrain_config train.train_iters=20
"""
_EXIT_STATUS = (
    "Exit status: 0 for success, 1 where the job failed or found a mismatch, 2 for arguments that cannot be used, "
    "130 where Ctrl-C or SIGTERM interrupted it."
)

app = typer.Typer(
    cls=_Group,
    name="falcon-bridge",
    help=_HELP,
    epilog=_EXIT_STATUS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"falcon-bridge {version('falcon-bridge')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def _register() -> None:
    from falcon_bridge.cli.convert import convert
    from falcon_bridge.cli.data import data
    from falcon_bridge.cli.demo import demo
    from falcon_bridge.cli.generate import generate
    from falcon_bridge.cli.launch import launch
    from falcon_bridge.cli.models import models
    from falcon_bridge.cli.recipes import recipes
    from falcon_bridge.cli.train import train
    from falcon_bridge.cli.verify import verify

    for verb in (demo, verify, train, launch, generate, models, recipes):
        app.command()(verb)
    app.add_typer(convert)
    app.add_typer(data)


_register()
