"""By which route each actor gets a push."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.registry import ActorState
from learner.weights.routes import MAX_PUSHES_OUT, Probation, Topology, plan_routes, topology_of
from protocol.errors import ConfigError
from protocol.messages import PROTOCOL_VERSION, Hello
from tests.unit.factories import make_config

HERE, THERE = "boot-1/4/1000", "boot-2/4/1000"


def make_actor(number: int, machine: str = HERE, gpu: str = "") -> ActorState:
    hello = Hello(protocol=PROTOCOL_VERSION, session=f"s{number}", machine=machine, gpu=gpu)
    return ActorState(f"s{number}", hello, 0.0, 0.0, 0.0, number)


def routes(backend: str, *actors: ActorState, machine: str = HERE, gpu: str = "") -> list[str]:
    return list(plan_routes(actors, Topology(backend, machine, torch.device("cpu"), gpu)).values())


def test_gloo_takes_everybody():
    assert routes("gloo", make_actor(1), make_actor(2, THERE, "gpu")) == ["collective"] * 2


def test_nccl_takes_one_actor_of_each_gpu_and_none_on_the_learners():
    found = routes(
        "nccl",
        make_actor(1, HERE, "gpu-0"),
        make_actor(2, HERE, "gpu-1"),
        make_actor(3, HERE, "gpu-1"),
        make_actor(4, THERE, "gpu-2"),
        make_actor(5, THERE, "gpu-2"),
        make_actor(6, THERE),
        make_actor(7, HERE),
        gpu="gpu-0",
    )
    assert found == [
        "shared", "collective", "shared", "collective", "stream", "stream", "shared",
    ]  # fmt: skip


def test_memory_is_shared_on_the_learners_machine_only():
    assert routes("shared", make_actor(1), make_actor(2, THERE)) == ["shared", "stream"]
    # A kernel that does not tell which machine it is: no two are the same.
    assert routes("shared", make_actor(1, ""), machine="") == ["stream"]


def test_whoever_asks_for_the_stream_gets_nothing_else():
    assert routes("stream", make_actor(1), make_actor(2, THERE, "gpu")) == ["stream"] * 2


@pytest.mark.parametrize(
    ("endpoints", "weights", "backend"),
    [
        ({}, {}, "gloo"),
        ({}, {"backend": "shared"}, "shared"),
        ({}, {"backend": "stream"}, "stream"),
        ({}, {"address": "10.1.2.3"}, "stream"),
        ({}, {"address": "10.1.2.3", "backend": "gloo"}, "gloo"),
    ],
)
def test_the_backend_is_chosen_by_where_the_learner_listens(endpoints, weights, backend):
    config = make_config(endpoints=endpoints, weights=weights)
    assert topology_of(config, torch.device("cpu")).backend == backend


def test_nccl_without_a_gpu_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r'weights\.backend = "nccl" .* on cpu: take "gloo"'):
        topology_of(make_config(weights={"backend": "nccl"}), torch.device("cpu"))


def pushes_until_admitted(probation: Probation) -> int:
    for count in range(MAX_PUSHES_OUT + 2):
        probation.next_push({"a"})
        if probation.admits("a"):
            return count
    raise AssertionError("never")


def test_an_actor_stays_out_of_more_and_more_pushes():
    """2^(n-1) - 1 after n failures in a row, and 63 at most."""
    probation, out = Probation(), []
    for _ in range(9):
        probation.failed("a")
        out.append(pushes_until_admitted(probation))
    assert out == [0, 1, 3, 7, 15, 31, 63, 63, 63]


def test_a_broadcast_that_went_well_forgives():
    probation = Probation()
    for _ in range(3):
        probation.failed("a")
    pushes_until_admitted(probation)
    probation.passed("a")
    probation.failed("a")
    assert pushes_until_admitted(probation) == 0


@given(st.lists(st.sampled_from(["failed", "passed", "push", "leave"])))
def test_nothing_is_remembered_of_actors_that_left(events):
    probation = Probation()
    for event in events:
        match event:
            case "failed":
                probation.failed("a")
            case "passed":
                probation.passed("a")
            case "push":
                probation.next_push({"a"})
            case "leave":
                probation.next_push(set())
                assert (probation._failures, probation._out) == ({}, {})
