"""Import Megatron Bridge where GPU-only packages are not installed.

Megatron Core and Bridge probe for Transformer Engine, mamba-ssm and nvidia-resiliency-ext themselves and take their
own branch without them, except for the modules in :data:`OPTIONAL_IMPORTS`, which import one of them unconditionally.
In those modules, and nowhere else, the import is replaced by a placeholder when they are loaded. ``sys.modules`` never
holds a placeholder, so every other probe sees the truth; where the real package is installed nothing is touched.
"""

import ast
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


# Module of Megatron Bridge -> the package it imports at top level although only features without use on a CPU need it.
OPTIONAL_IMPORTS = {
    # TEFusedLoRALinear, and isinstance checks against TE's linears
    "megatron.bridge.peft.lora_layers": "transformer_engine",
    # in-process restart: the annotation `CallWrapper | None`
    "megatron.bridge.training.pretrain": "nvidia_resiliency_ext",
}


class _PlaceholderMeta(type):
    """Any attribute of a placeholder is a placeholder, so that `te.ops.Sequential` can be named in an annotation."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.path}.{name}")


class _Placeholder(metaclass=_PlaceholderMeta):
    """A name of a package that is not installed: nothing is an instance of it, and calling it raises ImportError."""

    path: str

    def __new__(cls, *args: object, **kwargs: object) -> "_Placeholder":
        package = cls.path.partition(".")[0]
        raise ImportError(f"{cls.path} is needed here, but {package} is not installed", name=package)


def _placeholder(path: str) -> type:
    return _PlaceholderMeta(path.rpartition(".")[2], (_Placeholder,), {"path": path})


def _take_out_imports(tree: ast.Module, package: str) -> dict[str, str]:
    """Drop the module-level imports of ``package`` from ``tree``; those in functions and try blocks are left.

    Returns:
        Each name that they would have bound, with the dotted path it would have been bound to.
    """
    bound = {}
    for index, node in enumerate(tree.body):
        match node:
            case ast.Import(names=[ast.alias(name=path, asname=asname)]) if path.partition(".")[0] == package:
                bound[asname or package] = path if asname else package
            case ast.ImportFrom(module=str(path), names=names, level=0) if path.partition(".")[0] == package:
                bound.update({alias.asname or alias.name: f"{path}.{alias.name}" for alias in names})
            case _:
                continue
        tree.body[index] = ast.copy_location(ast.Pass(), node)
    return bound


class _Loader(SourceFileLoader):
    """Runs the body of a module of :data:`OPTIONAL_IMPORTS` without its import of the absent package."""

    def exec_module(self, module: ModuleType) -> None:
        # compiled here rather than by get_code(), whose bytecode cache outlives an installation of the package
        tree = ast.parse(self.get_data(self.path), filename=self.path)
        bound = _take_out_imports(tree, OPTIONAL_IMPORTS[module.__name__])
        code = compile(tree, self.path, "exec", dont_inherit=True)
        vars(module).update({name: _placeholder(path) for name, path in bound.items()})
        exec(code, vars(module))


class _Finder:
    """Finds the modules of :data:`OPTIONAL_IMPORTS` whose package is absent, and leaves everything else to others."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = OPTIONAL_IMPORTS.get(fullname)
        if package is None or importlib.util.find_spec(package) is not None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def allow_missing_dependencies() -> None:
    """Make ``import megatron.bridge`` work without Transformer Engine, mamba-ssm and nvidia-resiliency-ext.

    Call it before the first ``import megatron.bridge``; calling it again changes nothing. A package that is installed
    is never replaced, also if only some of them are. Calling anything of an absent package raises ``ImportError``.
    """
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
