"""What the measuring program counts, on trees of a few lines."""

import textwrap
from itertools import count
from pathlib import Path

import pytest

from tools import measure as module
from tools.measure import Measured, excesses, main, measure, table
from tools.source import Module, circles, read_module

NUMBERS = count()


def read(tmp_path: Path, text: str) -> Module:
    path = tmp_path / "some.py"
    path.write_text(textwrap.dedent(text))
    return read_module(path, "pkg.some")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty package that can be imported, of a name that no other test has."""
    name = f"measured_{next(NUMBERS)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text('"""All of it."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return name


def measured(tmp_path: Path, package: str, **files: str) -> Measured:
    for name, text in files.items():
        (tmp_path / package / f"{name}.py").write_text(textwrap.dedent(text))
    return measure(tmp_path, [package])


def test_functions_have_lines_parameters_and_types(tmp_path: Path) -> None:
    module = read(
        tmp_path,
        """
        @decorated
        def whole(a: int, /, b: int, *rest: int, c: int, **more: int) -> int:
            def inner(x): return x
            return a

        class Thing:
            def method(self, a: int) -> None: ...
            @staticmethod
            def static(a: int) -> None: ...
            @classmethod
            def of_class(cls) -> None: ...
        """,
    )
    assert [(f.name, f.lines, f.parameters, f.annotated) for f in module.functions] == [
        ("pkg.some.whole", 3, 5, True),
        ("pkg.some.whole.inner", 1, 1, False),
        ("pkg.some.Thing.method", 1, 1, True),
        ("pkg.some.Thing.static", 1, 1, True),
        ("pkg.some.Thing.of_class", 1, 0, True),
    ]


def test_attributes_are_what_is_assigned_to_self_and_what_is_annotated_in_the_class(
    tmp_path: Path,
) -> None:
    module = read(
        tmp_path,
        """
        class Thing:
            a: int
            constant = 3
            shared: ClassVar[int] = 4
            def __init__(self) -> None:
                self.a = self.b = 1
                self.c, (self.d, other.no) = 2, (3, 4)
                self.e: int = 5
                self.b += 1
                self.a.no = self.read
                with open() as self.f: pass
                class Inner:
                    def __init__(self): self.inner = 1
        """,
    )
    thing, inner = module.classes
    assert thing.attributes == set("abcdef")
    assert inner.attributes == {"inner"}


def test_dataclasses_structs_and_what_inherits_them_are_data(tmp_path: Path, package: str) -> None:
    found = measured(
        tmp_path,
        package,
        a="""
        @dataclasses.dataclass(frozen=True)
        class A: ...
        class B(msgspec.Struct, frozen=True): ...
        class C(Generic[T]): ...
        """,
        b="""
        class D(B): ...
        class E(D): ...
        class F(C): ...
        """,
    )
    behaving = [one.name.rpartition(".")[2] for one in found.together.behaving_classes]
    assert behaving == ["C", "F"]


def test_public_names_are_those_that_pydocstyle_asks_for(tmp_path: Path) -> None:
    module = read(
        tmp_path,
        '''
        """A module."""
        def told(): """Yes."""
        def untold(): def_inner = 1
        def _private(): ...
        @overload
        def untold(a): ...
        class Thing:
            """A thing."""
            def __init__(self): ...
            def __len__(self): ...
            def __call__(self): ...
            @property
            def value(self): ...
            @value.setter
            def value(self, value): ...
            class Inner: ...
        class _Hidden:
            def method(self): ...
        ''',
    )
    assert module.documented == {
        "pkg.some": True,
        "pkg.some.told": True,
        "pkg.some.untold": False,
        "pkg.some.Thing": True,
        "pkg.some.Thing.__call__": False,
        "pkg.some.Thing.value": False,
        "pkg.some.Thing.Inner": False,
    }


def test_a_circle_through_an_import_for_type_checkers_is_one(tmp_path: Path, package: str) -> None:
    measured(
        tmp_path,
        package,
        a=f"from {package} import b",
        b=f"from {package} import c",
        c=f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {package} import a",
        d=f"from {package} import a",
    )
    assert circles(tmp_path, [package]) == [[f"{package}.{name}" for name in "abc"]]


def test_the_table_has_a_column_per_package_and_names_what_is_large(
    tmp_path: Path, package: str
) -> None:
    body = "    pass\n" * 60
    found = measured(tmp_path, package, a=f"def long():\n{body}\ndef short(): ...\n")
    lines = table(found).splitlines()
    assert lines[0] == f"| | {package} | together |"
    # Two files, of 1 and of 63 lines; functions of 61 and of 1; one name of four is told of.
    assert lines[2] == "| files / lines | 2 / 64 | 2 / 64 |"
    assert lines[3] == "| file median / p90 / max | 1 / 63 / 63 | 1 / 63 / 63 |"
    assert lines[4] == "| function p50 / p95 / max | 1 / 61 / 61 | 1 / 61 / 61 |"
    assert lines[5] == "| functions over 60 lines | 1 | 1 |"
    assert lines[6] == "| fully annotated | 0 % | 0 % |"
    assert lines[7] == "| public names documented | 25 % | 25 % |"
    assert f"- lines: {package}.a.long 61" in lines


def test_a_check_names_all_that_exceeds_the_aims(
    tmp_path: Path, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = ", ".join(f"p{number}" for number in range(13))
    attributes = "; ".join(f"self.a{number} = 0" for number in range(16))
    long = "    pass\n" * 60
    measured(
        tmp_path,
        package,
        a=f'"""A."""\nfrom {package} import b\ndef _many({parameters}): ...\n',
        b=f'"""B."""\nfrom {package} import a\nclass Big:\n    def __init__(self): {attributes}\n',
        c=f'"""C."""\ndef _long():\n{long}',
    )
    arguments = ["--root", str(tmp_path), "--packages", package]
    assert main([*arguments, "--check"]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("too much")]
    assert [line.replace(f"{package}.", "") for line in found] == [
        "too much: circle of imports: a, b",
        "too much: c._long has 61 lines",
        "too much: a._many has 13 parameters",
        "too much: b.Big has 16 attributes",
        "too much: b.Big has no docstring",
    ]
    assert main(arguments) == 0


def test_what_meets_the_aims_passes_and_an_excuse_that_is_not_needed_does_not(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "    pass\n" * 60
    name = f"{package}.a._table"
    found = measured(tmp_path, package, a=f'"""A."""\ndef _table():\n{body}')
    monkeypatch.setattr(module, "TABULAR_FUNCTIONS", {name: "a table"})
    assert list(excesses(found)) == []
    monkeypatch.setattr(module, "TABULAR_FUNCTIONS", {name: "a table", "gone": "why"})
    assert list(excesses(found)) == ["gone is excused in tools.measure and need not be"]
