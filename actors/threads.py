"""Calls that block, off the event loop."""

import asyncio
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


async def in_daemon_thread(function: Callable[[], ResultT]) -> ResultT:
    """Like asyncio.to_thread, on a thread of its own that does not hold up the exit of the process.

    A collective cannot be interrupted and lasts until its deadline; a reward function may never
    return. asyncio's own executor would wait for both.
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
        try:
            result = function()
        except Exception as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    Thread(target=run, name="blocking-call", daemon=True).start()
    outcome: ResultT = await future
    return outcome
