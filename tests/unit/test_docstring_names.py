"""Names in backticks in docstrings exist: modules of ours, what is in them, and classes."""

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("protocol", "gdpo", "transfer", "actors", "learner", "deploy", "tools")
QUOTED = re.compile(r"``([^`\n]+)``|`([^`\n]+)`")
DOTTED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
CLASS = re.compile(r"_?[A-Z]\w*[a-z]\w*(?:\.\w+)*")


@dataclass
class Class:
    """Names in a class, and its bases."""

    members: set[str] = field(default_factory=set)
    bases: set[str] = field(default_factory=set)


@dataclass
class Module:
    """Names in a module: what it defines, what it imports, the members of its classes."""

    defined: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    classes: dict[str, Class] = field(default_factory=dict)
    docstrings: list[tuple[int, str]] = field(default_factory=list)


def assigned(node: ast.AST) -> Iterator[str]:
    """Yield the names and attributes that a statement binds."""
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield child.attr


def read(path: Path) -> Module:
    """Read one file: what stands in it at any depth counts as its own."""
    tree = ast.parse(path.read_text())
    module = Module(set(assigned(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imported |= {(one.asname or one.name).partition(".")[0] for one in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module.defined.add(node.name)
        elif isinstance(node, ast.ClassDef):
            module.defined.add(node.name)
            found = module.classes.setdefault(node.name, Class())
            found.members |= set(assigned(node))
            found.members |= {child.name for child in node.body if hasattr(child, "name")}
            found.bases |= {ast.unparse(base).partition("[")[0] for base in node.bases}
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            module.docstrings.append((node.lineno, node.value.value))
    return module


@cache
def project() -> dict[str, Module]:
    """All modules, by the names that they are imported by."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = read(path)
    return found


def has(classes: list[Class], member: str) -> bool:
    """Whether any of the classes has a member; one that inherits a stranger may have any."""
    for found in classes:
        if member in found.members:
            return True
        for base in found.bases:
            ours = classes_named(base.rpartition(".")[2])
            if not ours or has(ours, member):
                return True
    return False


def classes_named(name: str) -> list[Class]:
    return [one.classes[name] for one in project().values() if name in one.classes]


def is_ours(token: str) -> bool:
    """Whether `learner.replay.buffer.ReplayBuffer.take` names a module or something in one."""
    parts = token.split(".")
    for length in range(len(parts), 0, -1):
        module = project().get(".".join(parts[:length]))
        if module is None:
            continue
        rest = parts[length:]
        if not rest:
            return True
        if rest[0] not in module.defined | module.imported:
            return False
        return len(rest) == 1 or has(classes_named(rest[0]), rest[1])
    return False


def is_known(token: str, module: Module) -> bool:
    """Whether `Engine` or `Engine.load_weights` is a class of ours, or known where it stands."""
    name, _, member = token.partition(".")
    if classes := classes_named(name):
        return not member or has(classes, member.partition(".")[0])
    if name in module.imported or hasattr(builtins, name):
        return True
    return any(name in one.defined for one in project().values())


def unknown_names(module: Module) -> list[str]:
    """Name what a module's docstrings mention and is not there, each with its line."""
    found = []
    for line, text in module.docstrings:
        for double, single in QUOTED.findall(text):
            token = (double or single).removesuffix("()")
            if DOTTED.fullmatch(token):
                known = is_ours(token)
            elif CLASS.fullmatch(token):
                known = is_known(token, module)
            else:
                continue
            if not known:
                found.append(f"line {line}: {token}")
    return found


@pytest.mark.parametrize("name", sorted(project()))
def test_every_name_in_backticks_exists(name: str) -> None:
    assert unknown_names(project()[name]) == []


def test_what_is_not_there_is_found() -> None:
    text = """`learner.resume` `learner.replay.buffer` ``gdpo.Nothing`` `Roster2` `Path` `a.b` `Any`
    `learner.registry.Registry.nothing`"""
    module = Module(imported={"Path"}, docstrings=[(1, text)])
    assert unknown_names(module) == [
        "line 1: learner.resume",
        "line 1: gdpo.Nothing",
        "line 1: Roster2",
        "line 1: Any",
        "line 1: learner.registry.Registry.nothing",
    ]
