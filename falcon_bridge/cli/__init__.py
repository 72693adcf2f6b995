"""The ``falcon-bridge`` command.

Importing this package loads neither torch nor Megatron: each verb imports what it needs when it runs.
"""

from typing import NoReturn


def main(args: list[str] | None = None) -> NoReturn:
    """Console entry point; ends the process with the verb's exit status."""
    import sys

    from falcon_bridge.cli.app import app

    sys.exit(app(args, prog_name="falcon-bridge"))
