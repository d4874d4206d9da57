"""The table of threads in `actors.actor`, against the threads that the code starts."""

import ast
import threading
from pathlib import Path

import pytest

import actors.actor
from actors.threads import in_daemon_thread

ROOT = Path(actors.actor.__file__).parent.parent
OF_PYTHON = {"asyncio-waitpid"}


def names_in_the_code() -> set[str]:
    """Names of all threads that an actor starts; a thread without a name fails."""
    names = set()
    for folder in ("actors", "protocol", "transfer"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(func=ast.Name("in_daemon_thread"), args=[ast.Constant(name), *_]):
                        names.add(name)
                    case ast.Call(func=ast.Name("in_daemon_thread" | "Thread"), keywords=keywords):
                        values = {keyword.arg: keyword.value for keyword in keywords}
                        if path.name != "threads.py":
                            names.add(ast.literal_eval(values["name"]))
    return names


def names_in_the_table() -> set[str]:
    assert actors.actor.__doc__ is not None
    _, _, table = actors.actor.__doc__.partition("| thread ")
    rows = [line for line in table.splitlines()[1:] if line.startswith("| ")]
    return {row.split("|")[1].strip() for row in rows}


def test_the_table_lists_every_thread_that_the_code_starts_and_no_other():
    assert names_in_the_code() == names_in_the_table() - OF_PYTHON


async def test_a_blocking_call_has_its_own_thread_of_the_name_given():
    thread = await in_daemon_thread("digests", threading.current_thread)
    assert (thread.name, thread.daemon) == ("digests", True)


async def test_what_a_blocking_call_raises_is_raised_where_it_is_awaited():
    def end() -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        await in_daemon_thread("digests", end)
