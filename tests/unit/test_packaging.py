import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# in pieces, so that this file does not hold them
REGISTRY_HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "pypi." + "nvidia",
    "download." + "pytorch",
    "ngc." + "nvidia",
    "nvcr" + ".io",
    "npm" + "js.",
    "deb." + "debian",
    "crates" + ".io",
    "conda" + ".anaconda",
    "proxy." + "golang",
]


def requirements(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(name):
    found = {}
    for requirement in requirements(name):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} in {name} is no pin"
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def plain_environment(**changes):
    """The environment without what an outer `make test` adds to it."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "PYTEST_ARGS", "DEMO_OUT"}
    return {name: value for name, value in os.environ.items() if name not in outer} | changes


def make(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=plain_environment(**environment), capture_output=True, text=True
    )


def test_no_tracked_file_names_a_registry_host():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [ROOT / path for path in listed.stdout.split("\0") if path]
    assert ROOT / "pyproject.toml" in paths
    texts = {path: path.read_text(errors="ignore").lower() for path in paths if path.is_file()}
    named = [
        (str(path.relative_to(ROOT)), host) for path, text in texts.items() for host in REGISTRY_HOSTS if host in text
    ]
    assert named == []


@pytest.mark.parametrize(
    ("file", "extras"), [("cpu.txt", []), ("dev.txt", ["recipes", "dev"]), ("gpu.txt", ["recipes", "gpu"])]
)
def test_pins_are_what_pyproject_asks_for(file, extras):
    pinned = pins(file)
    asked = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{file} lacks {name}: run make requirements"
        assert requirement.specifier.contains(pinned[name]), f"{file} has {name} {pinned[name]}, not {requirement}"


def test_pinned_sets_agree_and_leave_out_what_is_overridden():
    dev, never = pins("dev.txt"), {canonicalize_name(r.name) for r in requirements("overrides.txt")}
    never_on_cpu = never | {canonicalize_name(r.name) for r in requirements("overrides-cpu.txt")}
    for file, left_out in (("cpu.txt", never_on_cpu), ("gpu.txt", never), ("dev.txt", never_on_cpu)):
        pinned = pins(file)
        assert {name: v for name, v in pinned.items() if dev.get(name, v) != v} == {}
        assert left_out & set(pinned) == set()
    assert set(pins("cpu.txt")) <= set(dev)


def test_this_environment_is_the_pinned_one():
    from importlib.metadata import version

    for name in ("torch", "megatron-core", "megatron-bridge", "transformers", "numpy"):
        assert Version(version(name)).public == pins("dev.txt")[name].public


def test_wheel_holds_the_package_and_the_recipes(tmp_path):
    source = tmp_path / "source"
    for name in ("falcon_bridge", "recipes", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    recipes = {f"falcon_bridge/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "falcon_bridge").rglob("*.py")}
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "falcon_bridge").rglob("ops/tuning/*.json")}
    assert tables and recipes | modules | tables | {"falcon_bridge/py.typed"} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"falcon_bridge"}


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "falcon-bridge demo --out demo-out"),
        ("test", "-m pytest"),
        ("lint", "ruff format --check ."),
        ("setup", "requirements/dev.txt"),
    ],
)
def test_make_target_sets_up_and_runs(target, command, tmp_path):
    """From a folder without .venv: the target's command comes after the installation of the pinned set."""
    for name in ("Makefile", "requirements", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    planned = make("-n", target, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    install = "--no-deps -r requirements/uv.txt -r requirements/dev.txt"
    assert install in planned.stdout
    assert planned.stdout.find(install) <= planned.stdout.rfind(command)
    assert command in planned.stdout

    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert "pip install" not in make("-n", target, cwd=tmp_path).stdout


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """A project folder, a home folder, and a PATH whose `python3.12` is a shim that does not run."""
    for name in ("Makefile", "requirements", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_script(tmp_path / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    write_script(tmp_path / "bin" / "python3", "exit 1")  # another version
    return tmp_path


def make_setup(machine, *arguments):
    path = f"{machine / 'bin'}:/usr/bin:/bin"
    return make("setup", *arguments, cwd=machine, PATH=path, HOME=str(machine / "home"))


def test_setup_says_in_one_line_that_no_python_runs(machine):
    done = make_setup(machine)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("falcon_bridge needs Python 3.12")
    assert "make PYTHON=/path/to/python3.12" in line
    assert not (machine / ".venv").exists()


def test_setup_passes_over_a_shim_that_does_not_run(machine):
    python = machine / "home" / ".pyenv" / "versions" / "3.12.9" / "bin" / "python3.12"
    write_script(python, '[ "$1" = -c ] && exit 0; exit 3')  # runs, and then fails to make a venv
    done = make_setup(machine)
    assert f"Setting up .venv with {python}" in done.stdout
    assert done.returncode != 0
    assert not (machine / ".venv" / ".installed").exists()


def test_setup_takes_the_python_it_is_given_and_no_other(machine):
    given = machine / "my" / "python"
    write_script(given, '[ "$1" = -c ] && exit 0; exit 3')
    assert f"Setting up .venv with {given}" in make_setup(machine, f"PYTHON={given}").stdout
    assert "none of these is one that runs: /no/python." in make_setup(machine, "PYTHON=/no/python").stderr


@pytest.mark.parametrize("failing", [None, "lint", "test"])
def test_ci_lints_tests_and_fails_with_them(failing, tmp_path):
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    write_script(tmp_path / "make", f'echo "$1" >>{tmp_path}/calls; [ "$1" != "{failing}" ]')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", script], cwd=tmp_path, env=plain_environment(PATH=path), capture_output=True)
    calls = (tmp_path / "calls").read_text().split()
    assert calls == (["lint"] if failing == "lint" else ["lint", "test"])
    assert (done.returncode == 0) == (failing is None)
