"""The tools of the chaos tests, as far as they need no processes."""

import inspect
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.chaos.points import POINTS, _owner, wrap
from tests.chaos.record import Tail
from tests.chaos.schedule import lives, schedule
from tests.chaos.toy import toy_rollout

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS.keys())
def test_every_crash_point_names_a_method_of_the_product(point):
    owner, name = _owner(point.method)
    assert inspect.isfunction(inspect.getattr_static(owner, name))


async def test_a_wrapped_method_is_seen_before_and_after(monkeypatch):
    class Thing:
        def plain(self, number: int) -> int:
            return number + 1

        async def waiting(self, number: int) -> int:
            return number + 2

    module = ModuleType("a_module")
    module.Thing = Thing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_module", module)
    seen: list[int] = []
    for name in ("plain", "waiting"):
        wrap(
            f"a_module:Thing.{name}",
            before=lambda arguments: seen.append(arguments[1]),
            after=lambda _, result: seen.append(result),
        )
    assert Thing().plain(1) == 2
    assert await Thing().waiting(5) == 7
    assert seen == [1, 2, 5, 7]


def test_a_schedule_is_repeated_by_its_seed_and_kills_every_twenty_seconds_on_average():
    assert schedule(7, 100, 3) == schedule(7, 100, 3) != schedule(8, 100, 3)
    faults = schedule(7, 20_000, 3)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(faults))
    # 1000 expected, with a standard deviation of sqrt(1000) = 32.
    assert sum(fault.kind == "kill" for fault in faults) == pytest.approx(1000, abs=100)


def test_lives_are_repeated_by_their_seed_and_end_in_the_middle_of_some_broadcast():
    assert lives(7, 0, 20, 23) == lives(7, 0, 20, 23)
    assert lives(7, 0, 20, 23) not in (lives(7, 1, 20, 23), lives(8, 0, 20, 23))
    many = lives(7, 0, 1000, 23)
    assert all(life.passage >= 1 for life in many)
    # Whoever leaves in order does so by a signal from outside.
    assert not any(life.moment for life in many if life.end == "leave")
    assert all(life.moment in POINTS for life in many if life.moment)
    buckets = {life.passage % 23 for life in many if life.moment == "push.bucket"}
    assert buckets == set(range(23))


def test_the_tail_of_a_record_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "record.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"event": "a"}\n{"eve')
    assert tail.read() == [{"event": "a"}]
    with path.open("a") as file:
        file.write('nt": "b"}\n')
    assert tail.read() == [{"event": "b"}]
    assert tail.read() == []


def test_what_a_toy_says_depends_on_seed_rollout_and_version_only():
    def tokens(*arguments: int) -> list[int]:
        return toy_rollout(*arguments).tokens.tolist()

    assert tokens(1, 0, 8, 3, 3) == tokens(1, 0, 8, 3, 3)
    others = [tokens(2, 0, 8, 3, 3), tokens(1, 1, 8, 3, 3), tokens(1, 0, 8, 4, 4)]
    assert tokens(1, 0, 8, 3, 3) not in others
    changed = toy_rollout(1, 0, 8, 3, 4)
    assert changed.spans == ((0, 3), (4, 4))
    np.testing.assert_array_equal(changed.tokens[4:], toy_rollout(1, 0, 8, 4, 4).tokens[4:])
