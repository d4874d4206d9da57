"""The documentation names what exists: configurations, keys, commands, files."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from deploy.cli import main
from learner.config.run import RunConfig

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "protocol/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

SECTIONS = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
KEY = re.compile(rf"\b(?P<section>{'|'.join(SECTIONS)})\.(?P<key>[a-z][a-z0-9_.]*[a-z0-9])")
SUFFIXES = ("py", "key", "key_secret", "json", "parquet")
"""Of files, which look like keys: endpoints.json."""
FILE = re.compile(
    r"\b(?:protocol|gdpo|transfer|actors|learner|deploy|tests|tools|examples|benchmarks)"
    r"/[A-Za-z0-9_./-]*[A-Za-z0-9_]\.(?:py|md|toml|json)\b"
)
COMMAND = re.compile(r"\bgdpo (?P<command>[a-z]+)")


def spans(text: str) -> str:
    """What is code on a page, in blocks and between backticks."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def exists(model: object, path: list[str]) -> bool:
    """Whether a key exists below a section."""
    if not path:
        return True
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return False
    field = model.model_fields.get(path[0])
    return field is not None and exists(field.annotation, path[1:])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_configuration_on_a_page_is_valid(page: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        tree = tomllib.loads(block)
        if "model" in tree:
            RunConfig.model_validate(tree)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_key_on_a_page_exists(page: Path) -> None:
    for match in KEY.finditer(spans(page.read_text())):
        path = match["key"].split(".")
        if path[-1] not in SUFFIXES:
            assert exists(SECTIONS[match["section"]], path), match[0]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_on_a_page_exists(page: Path) -> None:
    missing = [path for path in FILE.findall(page.read_text()) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_on_a_page_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    for match in COMMAND.finditer(spans(page.read_text())):
        assert re.search(rf"^ +{match['command']} ", help_text, re.MULTILINE), match[0]
