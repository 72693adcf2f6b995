import importlib
import sys

import pytest

from falcon_bridge.compat.post_import import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `late` that can be imported, and is forgotten afterwards."""
    (tmp_path / "late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.invalidate_caches()
    yield tmp_path / "late.py"
    sys.modules.pop("late", None)


def test_the_callback_runs_once_after_the_body(module):
    seen = []
    before = list(sys.meta_path)
    when_imported("late", lambda: seen.append(sys.modules["late"].value))
    assert seen == []
    import late

    assert seen == [1]
    assert sys.meta_path == before
    importlib.reload(late)
    assert seen == [1]


def test_a_module_that_is_there_already_is_answered_at_once(module):
    importlib.import_module("late")
    seen = []
    when_imported("late", lambda: seen.append(True))
    assert seen == [True]


def test_two_callbacks_both_run(module):
    seen = []
    when_imported("late", lambda: seen.append("first"))
    when_imported("late", lambda: seen.append("second"))
    importlib.import_module("late")
    assert sorted(seen) == ["first", "second"]
    assert sys.modules["late"].value == 1


def test_what_the_callback_raises_comes_out_of_the_import(module):
    def fail():
        raise RuntimeError("not with this version")

    when_imported("late", fail)
    with pytest.raises(RuntimeError, match="not with this version"):
        importlib.import_module("late")


def test_an_import_that_fails_can_be_tried_again(module):
    module.write_text("raise ImportError('half way')\n")
    seen = []
    when_imported("late", lambda: seen.append(True))
    with pytest.raises(ImportError, match="half way"):
        importlib.import_module("late")
    assert seen == []
    module.write_text("value = 22\n")
    importlib.invalidate_caches()
    importlib.import_module("late")
    assert seen == [True]


def test_other_imports_are_left_alone(module):
    when_imported("late", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="later"):
        importlib.import_module("later")
    assert importlib.util.find_spec("late").origin == str(module)


def test_looking_for_a_module_is_not_importing_it(module):
    """`find_spec` must leave the callback for the import that follows."""
    seen = []
    when_imported("late", lambda: seen.append(True))
    importlib.util.find_spec("late")
    assert seen == []
    importlib.import_module("late")
    assert seen == [True]
