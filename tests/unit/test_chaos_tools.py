"""The tools of the chaos tests, as far as they need no processes."""

import inspect
import itertools
import sys
from types import ModuleType

import numpy as np
import pytest

from tests.chaos.points import POINTS, _owner, wrap
from tests.chaos.schedule import schedule
from tests.chaos.toy import toy_rollout


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


def test_what_a_toy_says_depends_on_seed_rollout_and_version_only():
    def tokens(*arguments: int) -> list[int]:
        return toy_rollout(*arguments).tokens.tolist()

    assert tokens(1, 0, 8, 3, 3) == tokens(1, 0, 8, 3, 3)
    others = [tokens(2, 0, 8, 3, 3), tokens(1, 1, 8, 3, 3), tokens(1, 0, 8, 4, 4)]
    assert tokens(1, 0, 8, 3, 3) not in others
    changed = toy_rollout(1, 0, 8, 3, 4)
    assert changed.spans == ((0, 3), (4, 4))
    np.testing.assert_array_equal(changed.tokens[4:], toy_rollout(1, 0, 8, 4, 4).tokens[4:])
