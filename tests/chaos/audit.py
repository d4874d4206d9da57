"""The end of every chaos test: do the books, the digests and the guarantees hold?

The recorder's view and the learner's own summary are computed apart, and then compared.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tests.chaos.record import Event
from tests.integration.processes import assert_books_balance


def audit(events: list[Event], summary: dict[str, Any], *, max_uses: int = 1) -> dict[str, Any]:
    """Assert the guarantees that are numbered in the design; returns what was counted."""
    assert_books_balance(summary)
    leased = {e["lease"]: e for e in of(events, "leased")}
    received = [e["lease"] for e in of(events, "received")]
    failed = [e["lease"] for e in of(events, "failed")]
    trained = Counter(lease for e in of(events, "trained") for lease in e["leases"])

    # 1. A group is trained at most max_uses times, whatever is resent; nor is its prompt, which is
    # leased under another number after a loss.
    assert not [lease for lease, uses in trained.items() if uses > max_uses]
    prompts = Counter(leased[lease]["prompt"] for lease in trained)
    assert not [prompt for prompt, count in prompts.items() if count > 1]

    # 3. Each lease ends once, and the learner has counted what really happened.
    assert max(Counter([*received, *failed]).values(), default=0) <= 1
    assert trained.keys() <= set(received)
    books = summary["books"]
    for purpose, counts in books["leases"].items():
        mine = {lease for lease, e in leased.items() if e["purpose"] == purpose}
        assert counts["leased"] == len(mine)
        assert counts["received"] == sum(lease in mine for lease in received)
        assert sum(counts["failed"].values()) == sum(lease in mine for lease in failed)
    assert books["groups"]["trained"] == len(trained)

    # 5. Nothing consumed was too stale.
    lags = [e["version"] - oldest for e in of(events, "trained") for oldest in e["oldest"]]
    assert max(lags, default=0) <= summary["staleness"]["limit"]

    # 9. Whoever loaded a version loaded the learner's bytes, and had them until it loaded the next.
    published = {e["version"]: e for e in of(events, "published")}
    held = [e for e in of(events, "loaded", "confirmed", "replaced") if e["version"] in published]
    for event in held:
        ours = published[event["version"]]
        wrong = [key for key in ("digest", "content") if event.get(key, ours[key]) != ours[key]]
        assert not wrong, f"other weights than version {event['version']}: {event}"
    loads = of(held, "loaded")
    assert summary["weights"]["digest_mismatches"] == 0
    return {
        "groups_trained": len(trained),
        "steps": summary["steps"],
        "leases_failed": sum(sum(b["failed"].values()) for b in books["leases"].values()),
        "groups_evicted": sum(books["groups"]["evicted"].values()),
        "largest_staleness": max(lags, default=0),
        "loads_checked": len(loads),
        "actors_lost": summary["actors_lost"],
    }


def of(events: Iterable[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event["event"] in kinds]
