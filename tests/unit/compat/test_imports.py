import importlib
import subprocess
import sys
import textwrap

import pytest

from falcon_bridge.compat import allow_missing_dependencies, imports


OPTIONAL_PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d", "nvidia_resiliency_ext")


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes a package `host` whose module `needs` imports `absent_package`, and lists it as optional."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "OPTIONAL_IMPORTS", {"host.needs": "absent_package"})
    monkeypatch.setattr(sys, "meta_path", [imports._Finder, *sys.meta_path])

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    write("host/__init__.py", "")
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in ("host", "absent_package")]:
        del sys.modules[name]


@pytest.fixture
def load_again(monkeypatch):
    """Loads a module of Megatron Bridge anew, and puts the loaded one back afterwards."""

    def load(name):
        parent, _, leaf = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), leaf, None)  # restored after the test
        monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(name)

    return load


def test_megatron_bridge_imports_and_probes_see_the_truth(megatron_bridge):
    import megatron.core.tensor_parallel.random as random
    from megatron.core.ssm import mamba_mixer

    for package in OPTIONAL_PACKAGES:
        if importlib.util.find_spec(package) is None:
            assert not [name for name in sys.modules if name.split(".")[0] == package]
    assert (importlib.util.find_spec("transformer_engine") is not None) == random.HAVE_TE
    assert (importlib.util.find_spec("mamba_ssm") is not None) == mamba_mixer.HAVE_MAMBA_SSM
    assert callable(importlib.import_module("megatron.bridge.training.pretrain").pretrain)


@pytest.mark.parametrize(("module", "package"), imports.OPTIONAL_IMPORTS.items())
def test_each_entry_is_needed(module, package, load_again, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # absent here, also on a GPU machine
    assert load_again(module)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not imports._Finder])
    with pytest.raises(ModuleNotFoundError, match=package):
        load_again(module)


def test_no_other_module_of_the_import_path_needs_an_entry():
    """In a process of its own: all that we use imports with the two entries alone, and no placeholder is left."""
    code = f"""
        import sys
        for name in {OPTIONAL_PACKAGES}:
            sys.modules[name] = None
        from falcon_bridge.compat import allow_missing_dependencies
        allow_missing_dependencies()
        import megatron.bridge, megatron.bridge.peft, megatron.bridge.recipes, megatron.bridge.training.finetune
        import megatron.bridge.training.pretrain, megatron.bridge.training.gpt_step, megatron.core.ssm.mamba_mixer
        left = [name for name in sys.modules if name.split(".")[0] in {OPTIONAL_PACKAGES} and sys.modules[name]]
        sys.exit(f"placeholders left: {{left}}" if left else 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_installed_transformer_engine_is_used_while_resiliency_ext_is_absent(load_again, tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("imported = []\n")
    (package / "__init__.py").write_text(
        "import transformer_engine, types\ntransformer_engine.imported.append(__name__)\n"
        "ops = types.SimpleNamespace(Sequential=type('Sequential', (), {}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.delitem(sys.modules, "transformer_engine.pytorch", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    importlib.invalidate_caches()
    try:
        assert imports._Finder.find_spec("megatron.bridge.peft.lora_layers", megatron_path("peft")) is None
        lora_layers = load_again("megatron.bridge.peft.lora_layers")
        assert lora_layers.te is sys.modules["transformer_engine.pytorch"]
        assert sys.modules["transformer_engine"].imported == ["transformer_engine.pytorch"]
        assert lora_layers.te.__file__.startswith(str(tmp_path))

        pretrain = load_again("megatron.bridge.training.pretrain")
        assert issubclass(pretrain.CallWrapper, imports._Placeholder)
    finally:
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            sys.modules.pop(name, None)


def megatron_path(subpackage):
    return importlib.import_module(f"megatron.bridge.{subpackage}").__path__


def test_use_of_an_absent_package_says_what_is_missing(load_again, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    te = load_again("megatron.bridge.peft.lora_layers").te
    assert not isinstance(object(), (te.Linear, te.LayerNormLinear))
    with pytest.raises(
        ImportError, match=r"transformer_engine\.pytorch\.ops\.Sequential .* transformer_engine is not"
    ):
        te.ops.Sequential()


def test_placeholder_is_seen_by_the_listed_module_only(host):
    host("host/needs.py", "import absent_package.a as a\nimport host.probe\nfrom absent_package.b import c as d, e\n")
    host("host/probe.py", "import importlib.util\nfound = importlib.util.find_spec('absent_package')\n")
    needs = importlib.import_module("host.needs")
    assert needs.host.probe.found is None
    assert [(needs.a.path), needs.d.path, needs.e.path] == [
        "absent_package.a",
        "absent_package.b.c",
        "absent_package.b.e",
    ]
    assert "absent_package" not in sys.modules

    host("host/other.py", "import absent_package\n")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("host.other")


def test_plain_import_binds_the_package(host):
    host("host/needs.py", "import absent_package.a\ninner = absent_package.a.b\n")
    assert importlib.import_module("host.needs").inner.path == "absent_package.a.b"


def test_imports_with_their_own_way_to_fail_still_fail(host):
    host("host/needs.py", "try:\n    import absent_package\nexcept ImportError:\n    absent_package = 'own branch'\n")
    assert importlib.import_module("host.needs").absent_package == "own branch"


def test_nothing_is_left_behind_by_a_body_that_fails(host):
    host("host/needs.py", "import absent_package\nraise RuntimeError('half way')\n")
    with pytest.raises(RuntimeError, match="half way"):
        importlib.import_module("host.needs")
    assert not {"absent_package", "host.needs"} & set(sys.modules)


def test_package_installed_later_is_used_despite_the_bytecode_cache(host, tmp_path):
    host("host/needs.py", "import absent_package\n")
    assert issubclass(importlib.import_module("host.needs").absent_package, imports._Placeholder)
    host("absent_package.py", "real = True\n")
    del sys.modules["host.needs"]
    assert importlib.import_module("host.needs").absent_package.real is True


def test_traceback_and_source_lines_are_those_of_the_file(host):
    host("host/needs.py", "import absent_package\n\n\ndef fail():\n    raise ValueError\n")
    needs = importlib.import_module("host.needs")
    assert needs.fail.__code__.co_firstlineno == 4
    assert needs.__file__.endswith("needs.py")


def test_calling_it_again_changes_nothing():
    before = list(sys.meta_path)
    allow_missing_dependencies()
    assert sys.meta_path == before
