"""An actor as a process."""

import asyncio
import sys

import torch

from actors.actor import Actor, ActorOptions
from deploy.launch.lifeline import when_parent_dies

SWITCH_INTERVAL_S = 0.0005
"""A tenth of Python's own. A thread that generates may keep the interpreter from others for so long
each time that they need it, and a push needs it again and again, on several threads."""


def run_actor(options: ActorOptions, *, threads: int, as_child: bool) -> int:
    """Run until the learner ends the run or the actor is told to stop; returns the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    torch.set_num_threads(threads)
    asyncio.run(_run(options, as_child))
    return 0


async def _run(options: ActorOptions, as_child: bool) -> None:
    actor = Actor(options)
    if as_child:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.call_soon_threadsafe(actor.stop, "the launcher is gone")

        when_parent_dies(stop)
    await actor.run()
