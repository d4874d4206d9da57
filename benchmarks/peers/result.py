"""What came out of a case, for one of the systems."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from learner.records import Step, Summary


@dataclass(frozen=True)
class Result:
    """Figures of all batches, from the first prompt to the last optimiser step."""

    system: str
    samples_per_batch: int
    ends: Sequence[float]
    """When each batch was done, in seconds from the first prompt on."""
    tokens_per_sample: float
    split: dict[str, float]
    """Shares of the time by what it went into."""
    peak_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Most resident memory of each process, by role."""
    note: str = ""
    """What went wrong, or ended it early."""

    @property
    def samples_per_s(self) -> float:
        """Completions generated, scored and trained on in a second; 0 without any batch."""
        return len(self.ends) * self.samples_per_batch / self.ends[-1] if self.ends else 0.0

    @property
    def later_samples_per_s(self) -> float:
        """The same after the first quarter of the batches, when everything is warm."""
        first = len(self.ends) // 4
        if not first:
            return self.samples_per_s
        seconds = self.ends[-1] - self.ends[first - 1]
        return (len(self.ends) - first) * self.samples_per_batch / seconds

    @property
    def batch_seconds(self) -> float:
        """The median from the end of one batch to that of the next."""
        return median(b - a for a, b in zip((0.0, *self.ends), self.ends, strict=False))

    def as_json(self) -> dict[str, Any]:
        """Return everything, the rates included."""
        rates = {name: getattr(self, name) for name in ("samples_per_s", "later_samples_per_s")}
        return {**asdict(self), **rates}


def of_trl(samples: int, lines: Sequence[dict[str, float]], **rest: Any) -> Result:
    """Read the lines that `benchmarks.peers.with_trl` wrote."""
    if not lines:
        return Result("TRL", samples, [], 0.0, {}, **rest)
    last = lines[-1]
    shares = {part: last[part] / last["seconds"] for part in ("generation", "rewards")}
    return Result(
        "TRL",
        samples,
        [line["seconds"] for line in lines],
        last["tokens"] / (samples * len(lines)),
        {**shares, "training": 1 - sum(shares.values())},
        **rest,
    )


def of_ours(samples: int, steps: Sequence[Step], summary: Summary | None, **rest: Any) -> Result:
    """Read what a run left in its folder; ``summary`` is None if it did not come to an end."""
    if not steps:
        return Result("async-gdpo", samples, [], 0.0, {}, **rest)
    seconds = steps[-1].seconds
    training = sum(step.step_seconds for step in steps) / seconds
    idle = _mean([step.actor_idle_share for step in steps])
    stalled = summary.weights.actors_stalled_share if summary else 0.0
    return Result(
        "async-gdpo",
        samples,
        [step.seconds for step in steps],
        _mean([step.metrics["completions/mean_length"] for step in steps]),
        {
            "training": training,
            "learner waits": 1 - training,
            "generation": 1 - idle - stalled,
            "actors wait": idle,
            "actors load weights": stalled,
        },
        **rest,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
