"""Calls that block, off the event loop."""

import asyncio
import contextlib
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


async def in_daemon_thread(name: str, function: Callable[[], ResultT]) -> ResultT:
    """Call a function on a thread of its own, which does not hold up the exit of the process.

    A collective cannot be interrupted and lasts until its deadline; the executor of
    asyncio.to_thread would wait for it. ``name`` is the thread's.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except StopIteration as problem:
            # A future refuses it.
            error = RuntimeError(f"StopIteration: {problem}")
        except Exception as problem:
            error = problem
        except BaseException as problem:
            # SystemExit and its like must not end the process from in here.
            error = RuntimeError(f"{type(problem).__name__}: {problem}")
        # The loop is closed if the process is leaving: then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    Thread(target=run, name=name, daemon=True).start()
    outcome: ResultT = await future
    return outcome
