"""Durations of phases: histograms for Prometheus and their means."""

from threading import Thread

from prometheus_client import CollectorRegistry

from learner.phases import Phases


def test_every_phase_has_a_histogram_and_a_mean():
    registry = CollectorRegistry()
    phases = Phases(registry)
    for seconds in (1.0, 3.0):
        phases.actor("generate", seconds)
    phases.push({"pack": 0.5}, whole_seconds=2.0)
    phases.checkpoint(4.0)
    assert phases.mean_seconds == {
        "checkpoint_copy": 4.0,
        "generate": 2.0,
        "weights_pack": 0.5,
        "weights_whole": 2.0,
    }
    for name, labels, total in (
        ("gdpo_actor_phase_seconds_sum", {"phase": "generate"}, 4.0),
        ("gdpo_weight_push_seconds_sum", {"phase": "pack"}, 0.5),
        ("gdpo_weight_push_seconds_sum", {"phase": "whole"}, 2.0),
        ("gdpo_checkpoint_copy_seconds_count", {}, 1.0),
    ):
        assert registry.get_sample_value(name, labels) == total


def test_threads_that_count_at_once_lose_nothing():
    phases = Phases(CollectorRegistry())

    def count() -> None:
        for _ in range(2000):
            phases.actor("score", 1.0)

    threads = [Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert phases._totals["score"] == (8000, 8000.0)
