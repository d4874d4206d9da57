"""What Python files hold, read from their syntax: functions, classes, docstrings, imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import grimp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DATA_BASES = frozenset(
    {
        "BaseModel",
        "Enum",
        "IntEnum",
        "NamedTuple",
        "Protocol",
        "StrEnum",
        "Struct",
        "TypedDict",
    }
)
"""Bases of classes that only hold values or describe them."""
UNDOCUMENTED_DECORATORS = frozenset({"overload", "override", "setter", "deleter"})
"""What they decorate is documented elsewhere."""
DOCUMENTED_DUNDERS = frozenset({"__call__", "__new__"})

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or a method, with its place in the project as its name."""

    name: str
    lines: int
    """From its `def` to its end, decorators apart."""
    parameters: int
    """Without `self` and `cls`."""
    annotated: bool
    """Whether all parameters and the return value have a type."""


@dataclass(frozen=True)
class Class:
    """A class and how much it holds."""

    name: str
    bases: tuple[str, ...]
    """Last parts of their names."""
    attributes: frozenset[str]
    """Assigned to `self` in a method, or annotated in the body of the class."""
    is_data: bool
    """Whether its own decorators and bases say so; those of its bases may, too."""


@dataclass
class Module:
    """All that one file holds."""

    name: str
    lines: int
    functions: list[Function] = field(default_factory=list)
    classes: list[Class] = field(default_factory=list)
    documented: dict[str, bool] = field(default_factory=dict)
    """Public names, and whether they have a docstring."""


@dataclass
class Package:
    """A top-level package, with all modules below it; or several of them together."""

    name: str
    modules: list[Module]
    data_names: frozenset[str]
    """Classes of the project whose heirs are data."""

    @cached_property
    def functions(self) -> list[Function]:
        """Functions and methods of all modules, nested ones too."""
        return [function for module in self.modules for function in module.functions]

    @cached_property
    def classes(self) -> list[Class]:
        """Classes of all modules, nested ones too."""
        return [found for module in self.modules for found in module.classes]

    @cached_property
    def documented(self) -> dict[str, bool]:
        """Public names of all modules, and whether they have a docstring."""
        return {name: told for module in self.modules for name, told in module.documented.items()}

    @property
    def behaving_classes(self) -> list[Class]:
        """Classes that are data neither by themselves nor by a base."""
        return [
            found
            for found in self.classes
            if not found.is_data and not self.data_names & set(found.bases)
        ]


def data_names(modules: list[Module]) -> frozenset[str]:
    """Names of all classes that are data, those that inherit it included."""
    classes = [found for module in modules for found in module.classes]
    names: set[str] = set()
    while heirs := {
        name
        for found in classes
        if (name := found.name.rpartition(".")[2]) not in names
        and (found.is_data or names & set(found.bases))
    }:
        names |= heirs
    return frozenset(names)


def read_modules(root: Path, package: str) -> list[Module]:
    """Read all modules of a package in the folder ``root``, but those files that are empty."""
    paths = sorted((root / package).rglob("*.py"))
    filled = [path for path in paths if path.read_text().strip()]
    return [read_module(path, module_name(root, path)) for path in filled]


def module_name(root: Path, path: Path) -> str:
    """Name of a file as it is imported from ``root``: a package's is that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_module(path: Path, name: str) -> Module:
    """Read one file; ``name`` is what it is imported as."""
    text = path.read_text()
    tree = ast.parse(text, path)
    module = Module(name, len(text.splitlines()))
    if name.endswith("__main__") or _is_public(name.rpartition(".")[2]):
        module.documented[name] = ast.get_docstring(tree) is not None
    _read_body(module, tree, name, public=True, in_class=False)
    return module


def circles(root: Path, packages: list[str]) -> list[list[str]]:
    """Groups of modules that import one another, imports for type checkers included.

    ``root`` has to be the first place where the packages are looked for (`sys.path`).
    """
    graph = grimp.build_graph(*packages, cache_dir=None)
    for package in packages:
        assert (root / package).is_dir(), f"no package {package} in {root}"
    names = sorted(graph.modules)
    numbers = {name: number for number, name in enumerate(names)}
    arrows = [
        (numbers[name], numbers[imported])
        for name in names
        for imported in graph.find_modules_directly_imported_by(name)
    ]
    rows, columns = zip(*arrows, strict=True) if arrows else ((), ())
    matrix = coo_array(([1] * len(arrows), (rows, columns)), shape=(len(names), len(names)))
    _, labels = connected_components(matrix, directed=True, connection="strong")
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _read_body(module: Module, node: ast.AST, name: str, *, public: bool, in_class: bool) -> None:
    """Read definitions at any depth; only those of modules and public classes are public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            full = f"{name}.{child.name}"
            module.functions.append(_read_function(child, full, in_class))
            if public and _needs_docstring(child):
                module.documented[full] = ast.get_docstring(child) is not None
            _read_body(module, child, full, public=False, in_class=False)
        elif isinstance(child, ast.ClassDef):
            full = f"{name}.{child.name}"
            module.classes.append(_read_class(child, full))
            told = public and _is_public(child.name)
            if told:
                module.documented[full] = ast.get_docstring(child) is not None
            _read_body(module, child, full, public=told, in_class=True)
        else:
            _read_body(module, child, name, public=public, in_class=in_class)


def _read_function(node: Definition, name: str, in_class: bool) -> Function:
    given = node.args
    named = [*given.posonlyargs, *given.args]
    if in_class and "staticmethod" not in _decorators(node):
        named = named[1:]
    rest = [one for one in (given.vararg, given.kwarg) if one is not None]
    parameters = [*named, *given.kwonlyargs, *rest]
    annotated = node.returns is not None and all(one.annotation for one in parameters)
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return Function(name, lines, len(parameters), annotated)


def _read_class(node: ast.ClassDef, name: str) -> Class:
    attributes = {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
    }
    for method in node.body:
        if isinstance(method, Definition):
            attributes |= _assigned_attributes(method)
    bases = tuple(_last_name(base) for base in node.bases)
    is_data = bool(DATA_BASES & set(bases)) or "dataclass" in _decorators(node)
    return Class(name, bases, frozenset(attributes), is_data)


def _assigned_attributes(method: Definition) -> set[str]:
    positional = [*method.args.posonlyargs, *method.args.args]
    if not positional or "staticmethod" in _decorators(method):
        return set()
    return {
        node.attr
        for node in _walk_outside_classes(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == positional[0].arg
    }


def _walk_outside_classes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef):
            yield from _walk_outside_classes(child)


def _decorators(node: Definition | ast.ClassDef) -> set[str]:
    return {_last_name(decorator) for decorator in node.decorator_list}


def _last_name(node: ast.expr) -> str:
    """What follows the last dot: of `@dataclasses.dataclass(frozen=True)`, `dataclass`."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _needs_docstring(node: Definition) -> bool:
    if UNDOCUMENTED_DECORATORS & _decorators(node):
        return False
    return node.name in DOCUMENTED_DUNDERS or _is_public(node.name)


def _is_public(name: str) -> bool:
    return not name.startswith("_")
