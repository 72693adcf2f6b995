import errno

import pytest

from falcon_bridge.conversion.atomic import atomic_directory
from falcon_bridge.errors import JobError, UserError


def _tree(path):
    return {str(p.relative_to(path)): p.read_text() if p.is_file() else None for p in sorted(path.rglob("*"))}


def test_appears_whole_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with atomic_directory(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert _tree(tmp_path / "a") == {"b": None, "b/out": None, "b/out/file": "x"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device"), ValueError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_everything_as_before(tmp_path, error, existing):
    target = tmp_path / "a" / "out"
    if existing:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
    before = _tree(tmp_path)
    kind = type(error) if isinstance(error, Exception) else error
    with pytest.raises(kind), atomic_directory(target, force=True) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        raise error
    assert _tree(tmp_path) == before


def test_force_replaces_a_directory_a_file_and_a_link(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "directory" / "sub").mkdir(parents=True)
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("directory", "file", "link"):
        with atomic_directory(tmp_path / name, force=True) as partial:
            (partial / "new").write_text(name)
    assert _tree(tmp_path) == {
        "kept": None,
        "kept/file": "kept",
        **dict.fromkeys(("directory", "file", "link")),
        **{f"{name}/new": name for name in ("directory", "file", "link")},
    }


def test_a_swap_that_fails_restores_the_old_one(tmp_path, monkeypatch):
    from pathlib import Path

    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def fail_for_partial(self, new):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "I/O error")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(OSError), atomic_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
    assert _tree(tmp_path) == {"out": None, "out/old": "old"}


def test_a_target_that_was_made_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(UserError, match="--force"), atomic_directory(target) as partial:
        (partial / "new").write_text("new")
        target.mkdir()
    assert _tree(tmp_path) == {"out": None}


def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="--force"), atomic_directory(target):
            pass
    with pytest.raises(UserError, match="is a file"), atomic_directory(tmp_path / "file" / "out"):
        pass
    inside = tmp_path / "project"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(UserError, match="would remove"), atomic_directory(tmp_path, force=True):
        pass
    with pytest.raises(JobError, match="free"), atomic_directory(tmp_path / "new" / "out", bytes_needed=10**18):
        pass
    assert _tree(tmp_path) == {"file": "x", "project": None}
