"""What `import gdpo` offers: complete, sorted, documented."""

import ast
import inspect
import pkgutil
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import gdpo

MODULES = [import_module(f"gdpo.{module.name}") for module in pkgutil.iter_modules(gdpo.__path__)]


def documented_names(path: Path) -> set[str]:
    """Constants of a module that a docstring follows."""
    body = ast.parse(path.read_text()).body
    names = set()
    for statement, after in pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            if isinstance(statement, ast.AnnAssign):
                names.add(ast.unparse(statement.target))
            elif isinstance(statement, ast.Assign):
                names.add(ast.unparse(statement.targets[0]))
    return names


def test_the_names_are_sorted_constants_first() -> None:
    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    assert sorted(gdpo.__all__, key=order) == gdpo.__all__
    assert len(set(gdpo.__all__)) == len(gdpo.__all__)


def test_every_public_name_is_exported_and_every_export_exists() -> None:
    public = {
        name
        for name, value in vars(gdpo).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == {*gdpo.__all__}


@pytest.mark.parametrize("name", gdpo.__all__)
def test_every_export_is_documented_and_of_this_package(name: str) -> None:
    value = getattr(gdpo, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.startswith("gdpo.")
        assert value.__doc__
        # A dataclass without a docstring gets its signature for one.
        assert not value.__doc__.startswith(f"{name}(")
    else:
        files = [Path(str(module.__file__)) for module in MODULES]
        assert any(name in documented_names(file) for file in files)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_nothing_public_in_a_module_is_without_a_docstring(module: ModuleType) -> None:
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name


def test_every_correction_and_its_base_are_exported() -> None:
    for correction in gdpo.CORRECTIONS.values():
        assert correction.__name__ in gdpo.__all__
        assert issubclass(correction, gdpo.Correction)
