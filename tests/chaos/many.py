"""Many actors in one process, each with its own connection: ``URL COUNT GROUP_S``.

What is to be seen is the traffic of a fleet, for which a fleet's processes would need its machines.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from typing import Any

from actors.app import Actor, ActorOptions
from tests.chaos.toy import Toy, use_toy


async def run(url: str, count: int) -> None:
    loop = asyncio.get_running_loop()
    handlers: list[Callable[[], Any]] = []

    def remember(signum: int, callback: Callable[..., Any], *arguments: Any) -> None:
        if signum == signal.SIGTERM:
            handlers.append(lambda: callback(*arguments))

    def stop_all() -> None:
        for handler in handlers:
            handler()

    loop.add_signal_handler(signal.SIGTERM, stop_all)
    # Each actor thinks that the process is its own: the last one would take the signal alone.
    loop.add_signal_handler = remember  # type: ignore[method-assign,assignment]
    actors = [Actor(ActorOptions(learner=url, connect_timeout_s=120)) for _ in range(count)]
    await asyncio.gather(*(actor.run() for actor in actors))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    use_toy(Toy(group_s=float(sys.argv[3]), max_leases=1))
    asyncio.run(run(sys.argv[1], int(sys.argv[2])))
