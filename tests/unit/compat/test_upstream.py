import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.datasets import utils

import falcon_bridge
from falcon_bridge.compat import patch_missing_helpers_makefile
from falcon_bridge.compat.upstream import GPU_PACKAGES, PRIVATE, Private, helpers_are_compiled, resolve


def of_a_gpu_machine(name):
    return PRIVATE[name].path.split(".")[0] in GPU_PACKAGES


@pytest.mark.parametrize("name", [name for name in PRIVATE if not of_a_gpu_machine(name)])
def test_private_name_is_where_the_table_says(name):
    private = PRIVATE[name]
    assert private.why
    found = resolve(name)
    if private.mentions:
        assert private.mentions in inspect.getsource(found), f"{private.path} no longer reads {name} ({private.why})"


def test_a_name_that_moved_is_named_with_its_use(monkeypatch):
    monkeypatch.setitem(PRIVATE, "gone", Private("megatron.core.utils:GoneForGood.method", "an example"))
    with pytest.raises(ImportError, match=r"megatron\.core\.utils:GoneForGood\.method \(an example\) moved"):
        resolve("gone")
    monkeypatch.setitem(PRIVATE, "gone", Private("megatron.core.no_such_module:f", "an example"))
    with pytest.raises(ImportError, match=r"no_such_module:f \(an example\) moved"):
        resolve("gone")


def private_imports(path):
    """Private names that a file imports from upstream, as `module:name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        package, *inner = node.module.split(".")
        for alias in node.names if package in ("megatron", "transformers", "torch", *GPU_PACKAGES) else []:
            if any(part.startswith("_") for part in [*inner, alias.name]):
                yield f"{node.module}:{alias.name}"


def test_every_private_name_that_we_import_is_listed():
    root = Path(falcon_bridge.__file__).parent
    files = [*root.rglob("*.py"), *(root / "recipes").glob("*.py")]
    imported = {name: str(path.relative_to(root)) for path in files for name in private_imports(path)}
    listed = {private.path for private in PRIVATE.values()}
    assert {name: path for name, path in imported.items() if name not in listed} == {}
    assert "megatron.bridge.recipes.common:_pretrain_common" in imported


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
