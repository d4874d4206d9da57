"""Named moments at which a process of the system can be made to die, stop, hang or end.

The product has no hooks: `arm` wraps the method that a point names, in a process that was started
by `tests.chaos.entry`. At its Nth call the process writes down when, and does it to itself.
"""

import functools
import importlib
import inspect
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Moment = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Point:
    """One place in the code."""

    method: str
    """``module:Class.method`` or ``module:function``."""
    moment: Moment
    of: str = ""
    """Only calls whose first argument is of this type."""


POINTS = {
    # Actor: a lease has come, others are being generated.
    "rollout": Point("actors.rollouts.single_turn:RolloutWorker.roll_out", "before"),
    "rollout.done": Point("actors.rollouts.single_turn:RolloutWorker.roll_out", "after"),
    "engine.start": Point("actors.build:start_engine", "before"),
    "upload": Point("actors.link:LearnerLink.send", "before", of="GroupHeader"),
    "upload.sent": Point("actors.link:LearnerLink.send", "after", of="GroupHeader"),
    # Actor: the learner already waits in the collective; then the others wait too.
    "push": Point("actors.weights.broadcast:Collective.receive", "before"),
    "push.joined": Point("actors.weights.broadcast:Collective._meet", "after"),
    # Before each bucket of every broadcast; on the learner, too.
    "push.bucket": Point("transfer.gloo:GlooGroup.begin", "before"),
    "push.received": Point("actors.weights.broadcast:Collective.receive", "after"),
    "push.loaded": Point("actors.link:LearnerLink.send", "before", of="WeightsReady"),
    "goodbye": Point("actors.link:LearnerLink.send", "before", of="Goodbye"),
    # Learner.
    "learner.load": Point("learner.run.parts:load_trainer", "before"),
    "learner.evaluate": Point("learner.run.evaluations:Evaluations._begin", "before"),
    "learner.stored": Point("learner.replay.journal:Journal._write", "after"),
    "learner.answered": Point("learner.coordinator.intake:Intake._send", "after"),
    "learner.accepted": Point("learner.replay.buffer:ReplayBuffer.add", "after"),
    "learner.step": Point("learner.training.trainer:Trainer.step", "before"),
    "learner.step.inside": Point("learner.training.trainer:Trainer._backward", "before"),
    "learner.step.done": Point("learner.training.trainer:Trainer.step", "after"),
    "learner.push": Point("learner.weights.epochs:Epochs._meet", "before"),
    "learner.push.joined": Point("learner.weights.epochs:Epochs._meet", "after"),
    "learner.push.done": Point("learner.weights.epochs:Epochs._send", "after"),
    "learner.save": Point("learner.recovery.checkpoints:Checkpoints._write", "before"),
    "learner.save.half": Point("transformers:PreTrainedModel.save_pretrained", "after"),
    "learner.save.done": Point("learner.recovery.checkpoints:Checkpoints._write", "after"),
    "learner.leave": Point("learner.run.learner:Learner._leave", "before"),
    # A rank of the learner that is not the first.
    "rank.waits": Point("learner.training.ranks:Ranks.next_order", "before"),
    "rank.forward": Point("learner.packing.forward:Forward._call", "before"),
    "rank.reduced": Point("learner.training.optimizers:PolicyOptimizer.clip", "before"),
    "rank.gather": Point("learner.weights.pack:_whole", "before"),
    "rank.checkpoint": Point("learner.training.shards:_helped", "before"),
}

Deed = Literal["kill", "stop", "term", "hang"]


def do(deed: Deed) -> None:
    """To this process; ``stop`` returns when it is continued, ``hang`` never."""
    match deed:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            threading.Event().wait()


def arm(name: str, call: int, deed: Deed, mark: Path) -> None:
    """From now on the ``call``-th passage (from 1) of the point does ``deed``, once."""
    point = POINTS[name]
    passages = 0
    lock = threading.Lock()

    def passed(arguments: tuple[Any, ...]) -> None:
        nonlocal passages
        if point.of and type(arguments[1]).__name__ != point.of:
            return
        with lock:
            passages += 1
            if passages != call:
                return
        line = {"point": name, "deed": deed, "pid": os.getpid(), "at": time.monotonic()}
        partial = mark.with_suffix(".partial")
        partial.write_text(json.dumps(line))
        partial.rename(mark)
        do(deed)

    if point.moment == "before":
        wrap(point.method, before=passed)
    else:
        wrap(point.method, after=lambda arguments, _: passed(arguments))


def wrap(
    method: str,
    *,
    before: Callable[[tuple[Any, ...]], None] = lambda _: None,
    after: Callable[[tuple[Any, ...], Any], None] = lambda *_: None,
) -> None:
    """Call ``before(arguments)`` and ``after(arguments, result)`` around a method, async or not."""
    owner, name = _owner(method)
    original = inspect.getattr_static(owner, name)
    assert inspect.isfunction(original), f"{method} is no plain function"

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def waiting(*arguments: Any, **keywords: Any) -> Any:
            before(arguments)
            result = await original(*arguments, **keywords)
            after(arguments, result)
            return result

        setattr(owner, name, waiting)
        return

    @functools.wraps(original)
    def plain(*arguments: Any, **keywords: Any) -> Any:
        before(arguments)
        result = original(*arguments, **keywords)
        after(arguments, result)
        return result

    setattr(owner, name, plain)


def _owner(method: str) -> tuple[Any, str]:
    module, _, path = method.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name
