import shutil

import pytest
from typer.testing import CliRunner

from falcon_bridge.verification.checkpoints import write_random_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A sound checkpoint, not to be changed."""
    return write_random_checkpoint(tmp_path_factory.mktemp("pristine") / "hf", "gated_norm", seed=5)


@pytest.fixture
def hf(pristine, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "hf")


@pytest.fixture
def run():
    """Run the command line here; the result has exit_code, stdout and stderr."""
    from falcon_bridge.cli.app import app

    def invoke(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)

    return invoke
