"""Two hundred pushes to actors that come, go, die and freeze, most in the middle of a broadcast.

One actor stays from the beginning to the end, so that there is always somebody to learn from.
"""

import secrets
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen2ForCausalLM

from tests.chaos.audit import of
from tests.chaos.fleet import Fleet, Place
from tests.chaos.flight import Loads, Push, held_up, newest_before, pushes_in, training_waits
from tests.chaos.incidents import spread
from tests.chaos.record import read
from tests.chaos.schedule import lives
from tests.chaos.system import MARGIN_S, At, Chaos
from tests.integration.processes import Process, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

PUSHES = 200
PLACES = 4
LIVES = 20
"""In each place; more than there is time for."""
BUCKET_BYTES = 1 << 20
PUSH_TIMEOUT_S = 6.0
WAKE_UP_S = 0.5
"""Of the thread whose deadline has passed, on a busy machine, and to tell everybody to pull."""
CATCH_UP_S = PUSH_TIMEOUT_S + MARGIN_S
OTHERS = 6
"""Pushes that are looked at after one that was held up."""
POLL_S = 0.02


@pytest.fixture
def policy(tmp_path: Path, base_folder: Path) -> tuple[Path, int]:
    """The folder of a random policy that is so large that a broadcast takes its time; its bytes."""
    folder = tmp_path / "policy"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / name, folder)
    config = AutoConfig.from_pretrained(
        base_folder,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=4,
        layer_types=7 * ["full_attention"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return folder, sum(4 * parameter.numel() for parameter in model.parameters())


def settings(folder: Path) -> tuple[str, ...]:
    return (
        f"model.path={folder}",
        f"weights.bucket_bytes={BUCKET_BYTES}",
        "weights.backend=gloo",
        "training.minibatches=1",
        "checkpoints.every_steps=100000",
    )


def test_two_hundred_pushes(
    chaos: Chaos,
    figures: Callable[..., None],
    policy: tuple[Path, int],
    request: pytest.FixtureRequest,
):
    folder, num_bytes = policy
    seed = request.config.getoption("--chaos-seed")
    seed = secrets.randbelow(10**6) if seed is None else seed
    buckets = -(-num_bytes // BUCKET_BYTES)
    places = [Place(number, lives(seed, number, LIVES, buckets)) for number in range(PLACES)]
    print(f"\n    seed {seed}: repeat with --chaos-seed {seed}; {buckets} buckets in a push")
    print("\n".join(f"    place {p.number}, {life}" for p in places for life in p.plan))

    chaos.open_nursery()
    chaos.start_learner(*settings(folder), f"weights.push_timeout_s={PUSH_TIMEOUT_S}")
    steady = chaos.start_toy("steady")
    chaos.wait_for_groups(steady)
    fleet = Fleet(chaos, places)
    while fleet.pushes < PUSHES:
        fleet.turn()
        assert chaos.learner.popen.poll() is None, chaos.learner.output
        time.sleep(POLL_S)

    newest = newest_before(chaos.events("published"), time.monotonic())

    def everybody_is_well() -> bool:
        fleet.turn(starts=False)
        living = {steady.pid} | {process.pid for process in fleet.living}
        return fleet.is_calm and living <= chaos.holders_of(newest)

    wait_for(everybody_is_well, f"the last ones to leave, the others to hold {newest}", 60)
    # The end of the run cuts a push off.
    events = read(chaos.record)
    counted = chaos.audit()

    loads = Loads(events)
    pushes = pushes_in(events)
    begin, end = pushes[0].begin, pushes[-1].end
    during = [event for event in events if begin <= event["at"] <= end]
    late = [
        loads.after_s(pid, push.version, push.end)
        for push in pushes
        for pid in push.pids
        if fleet.was_well(pid, push.begin, push.end)
    ]
    caught_up = [
        loads.after_s(stop.pid, newest_before(events, stop.until), stop.until)
        for stop in fleet.stops
    ]
    waits = training_waits(during)
    figures(
        seed=seed,
        weights_mb=num_bytes / 1e6,
        pushes=len(pushes),
        seconds=end - begin,
        epochs=len({event["epoch"] for event in of(during, "broadcast")}),
        joins=len(of(during, "joined")),
        leaves=fleet.counts["leaves"],
        kills=fleet.counts["kills"],
        kills_in_a_push=fleet.counts["kills in a push"],
        stops=len(fleet.stops),
        stops_in_a_push=sum(stop.in_a_push for stop in fleet.stops),
        push=spread([push.seconds for push in pushes]),
        push_bound_s=PUSH_TIMEOUT_S,
        late=sum(after_s != 0 for after_s in late),
        late_by=spread([after_s for after_s in late if after_s != 0]),
        caught_up=spread(caught_up),
        training_waited=spread(waits),
        training_held_up=spread(held_up(during)),
        digests_wrong=0,
        **counted,
    )
    assert max(push.seconds for push in pushes) <= PUSH_TIMEOUT_S + WAKE_UP_S
    assert max(waits) <= PUSH_TIMEOUT_S
    assert None not in late
    assert all(after_s is not None and after_s <= CATCH_UP_S for after_s in caught_up)
    assert fleet.counts["kills in a push"] and fleet.counts["leaves"]
    assert any(stop.in_a_push for stop in fleet.stops)


@pytest.mark.parametrize(
    ("timeout_s", "push_timeout_s"),
    [
        # A second for the bucket, and another one for the confirmation: the rest is for the others.
        pytest.param(1.0, 4.0, id="no progress"),
        # The broadcast that is given up goes on for half a minute, in threads of everybody.
        pytest.param(30.0, 3.0, id="deadline"),
    ],
)
def test_a_member_that_freezes_unnoticed(
    chaos: Chaos,
    figures: Callable[..., None],
    policy: tuple[Path, int],
    timeout_s: float,
    push_timeout_s: float,
):
    """Nobody tells that it is gone: a push has nothing but its own deadlines."""
    folder, num_bytes = policy
    chaos.start_learner(
        *settings(folder),
        f"weights.timeout_s={timeout_s}",
        f"weights.push_timeout_s={push_timeout_s}",
        "deadlines.actor_timeout_s=60",
        # Prompts that it holds are waited for, unless their order does not count.
        'buffer.sampling="freshest"',
    )
    chaos.start_toys(2)
    buckets = -(-num_bytes // BUCKET_BYTES)
    moments = {"push": 4, "push.joined": 1, "push.bucket": 3 * buckets + buckets // 2}
    for moment, passage in moments.items():
        victim = chaos.start_toy(f"victim-{moment}", crash=At(moment, passage, "stop"))
        at = chaos.expect_crash(victim).at
        stuck, *others = pushes_without(chaos, victim, at)
        victim.signal(signal.SIGCONT)
        figures(
            moment=moment,
            push_s=stuck.seconds,
            bound_s=push_timeout_s,
            others=spread([push.seconds for push in others]),
            caught_up_s=caught_up_after_s(chaos, victim, time.monotonic()),
            training_waited=spread(training_waits(chaos.events("step", "stepped", since=at))),
        )
        assert victim.pid in stuck.pids
        assert stuck.seconds <= push_timeout_s + WAKE_UP_S
        # Once: who is behind catches up beside them.
        assert not any(victim.pid in push.pids for push in others)
        assert max(push.seconds for push in others) < stuck.seconds
        chaos.strike(victim, signal.SIGKILL)
    figures(**chaos.audit())


def pushes_without(chaos: Chaos, victim: Process, at: float) -> list[Push]:
    """The push during which an actor froze, and the next ones."""

    def pushes() -> list[Push]:
        everything = pushes_in(chaos.events("joined", "push", "pushed"))
        return [push for push in everything if push.end > at]

    wait_for(lambda: len(pushes()) >= OTHERS, f"pushes without {victim.log.stem}", 60)
    return pushes()


def caught_up_after_s(chaos: Chaos, victim: Process, since: float) -> float:
    """Until an actor held the newest version of ``since``; then it takes part in a push again."""
    newest = newest_before(chaos.events("published"), since)
    wait_for(lambda: victim.pid in chaos.holders_of(newest), "it to catch up", CATCH_UP_S)

    def takes_part() -> bool:
        pushes = pushes_in(chaos.events("joined", "push", "pushed"))
        return any(victim.pid in push.pids for push in pushes if push.begin > since)

    wait_for(takes_part, "it to take part in a push")
    seconds = Loads(chaos.events("loaded")).after_s(victim.pid, newest, since)
    assert seconds is not None
    return seconds
