import subprocess
import sys

import pytest
from megatron.core.datasets import utils

from falcon_bridge.compat import patch_missing_helpers_makefile, upstream
from falcon_bridge.compat.upstream import PRIVATE, Private, helpers_are_compiled


@pytest.mark.parametrize("name", PRIVATE)
def test_private_name_is_where_the_table_says(name):
    private = PRIVATE[name]
    assert private.why
    try:
        upstream.resolve(private.path)
    except ImportError as error:
        pytest.fail(f"{name} moved: {private.path} ({private.why}): {error}")


def test_a_name_that_moved_is_named_with_its_use(monkeypatch):
    monkeypatch.setitem(PRIVATE, "gone", Private("megatron.core.utils:GoneForGood.method", "an example"))
    with pytest.raises(ImportError, match=r"megatron\.core\.utils:GoneForGood\.method \(an example\) .* has no"):
        upstream.upstream("gone")
    monkeypatch.setitem(PRIVATE, "gone", Private("megatron.core.no_such_module:f", "an example"))
    with pytest.raises(ImportError, match=r"no_such_module:f \(an example\)"):
        upstream.upstream("gone")


def test_upstream_gives_the_object_itself():
    from megatron.core.tensor_parallel import random

    assert upstream.upstream("_get_cuda_rng_state") is random._get_cuda_rng_state


@pytest.fixture
def original_helpers(monkeypatch):
    """`compile_helpers` as upstream has it, whatever was patched before."""
    from megatron.bridge.training import initialize

    def original():
        subprocess.run(["make", "-C", "/nonexistent"], check=True)

    monkeypatch.setattr(utils, "compile_helpers", original)
    monkeypatch.setattr(initialize, "compile_helpers", original)
    return initialize, original


def test_helpers_are_not_made_where_the_wheel_has_no_makefile(original_helpers, tmp_path, monkeypatch):
    initialize, _ = original_helpers
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert patch_missing_helpers_makefile()
    assert utils.compile_helpers is initialize.compile_helpers is helpers_are_compiled
    assert utils.compile_helpers() is None


def test_helpers_are_made_where_there_is_a_makefile(original_helpers, tmp_path, monkeypatch):
    initialize, original = original_helpers
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert not patch_missing_helpers_makefile()
    assert utils.compile_helpers is initialize.compile_helpers is original


def test_helpers_are_made_where_they_are_not_built(original_helpers, tmp_path, monkeypatch):
    _, original = original_helpers
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    assert not patch_missing_helpers_makefile()
    assert utils.compile_helpers is original


@pytest.mark.usefixtures("original_helpers")
def test_training_modules_are_not_imported_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.delitem(sys.modules, "megatron.bridge.training.initialize")
    assert patch_missing_helpers_makefile()
    assert "megatron.bridge.training.initialize" not in sys.modules
