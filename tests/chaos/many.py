"""Many actors in one process, each with its own connection: ``URL COUNT GROUP_S``.

What is to be seen is the traffic of a fleet, for which a fleet's processes would need its machines.
It is to be killed: the actors share a loop, which each of them holds up when it leaves.
"""

import asyncio
import logging
import sys

from actors.actor import Actor, ActorOptions
from tests.chaos.toy import Toy, use_toy


async def run(url: str, count: int) -> None:
    actors = [Actor(ActorOptions(learner=url, connect_timeout_s=120)) for _ in range(count)]
    await asyncio.gather(*(actor.run() for actor in actors))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    use_toy(Toy(group_s=float(sys.argv[3]), max_leases=1))
    asyncio.run(run(sys.argv[1], int(sys.argv[2])))
