"""The publisher against actors that never come to the collective."""

import time

from learner.config import WeightsConfig
from learner.publisher import CLOSE_TIMEOUT_S, Publisher
from tests.unit.factories import Cluster, joined, make_snapshot


def make_publisher(cluster: Cluster, timeout_s: float) -> Publisher:
    return Publisher(
        cluster.coordinator,
        cluster.snapshots,
        WeightsConfig(timeout_s=timeout_s),
        "127.0.0.1",
        lambda: None,
    )


def test_closing_does_not_wait_for_a_hung_actor():
    """The collective cannot be interrupted, and its deadline is longer than a stop may take."""
    cluster = joined("hung")
    publisher = make_publisher(cluster, timeout_s=4.0)
    publisher.publish(make_snapshot(1))
    while publisher._collective.epoch == 0:
        time.sleep(0.01)
    cluster.coordinator.drain("SIGTERM")
    started = time.monotonic()
    publisher.close()
    assert time.monotonic() - started < CLOSE_TIMEOUT_S + 0.5


def test_a_push_that_nobody_needs_any_more_waits_for_no_confirmation():
    cluster = joined("hung")
    cluster.coordinator.drain("SIGTERM")
    started = time.monotonic()
    assert cluster.coordinator.wait_for_version(("hung",), 1, timeout_s=30.0) == ()
    assert time.monotonic() - started < 1.0
