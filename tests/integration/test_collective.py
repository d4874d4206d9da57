"""Collectives of real processes, by gloo; with NCCL they are in tests/gpu."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.collectives import (
    BODIES,
    Crew,
    Setting,
    every_member_gets_every_byte,
    survivors_of_a_killed_member_go_on_with_a_newcomer,
)

GLOO = Setting(
    backend="gloo",
    devices=("cpu",) * 3,
    bucket_bytes=16 << 20,
    deadline_s=1.5,
    released_by_abort=False,
)


@pytest.fixture
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    crew = Crew(getattr(request, "param", GLOO))
    yield crew
    crew.close()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_of_three_members(crew: Crew, body):
    body(crew)


@pytest.mark.parametrize("crew", [replace(GLOO, devices=("cpu",) * 2)], indirect=True)
@pytest.mark.parametrize(
    "body",
    [every_member_gets_every_byte, survivors_of_a_killed_member_go_on_with_a_newcomer],
    ids=lambda body: body.__name__,
)
def test_of_two_members(crew: Crew, body):
    body(crew)


@pytest.mark.parametrize("crew", [replace(GLOO, address="127.0.0.2")], indirect=True)
def test_sockets_are_bound_to_the_address_that_was_told(crew: Crew):
    crew.meet(1, crew.members)
    learner, *actors = crew.members
    assert learner.call("addresses") == {"127.0.0.2"}
    for actor in actors:
        assert actor.call("addresses") <= {"127.0.0.2"}
