"""Packed weights of the newest version, and of an older one while somebody still pulls it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from protocol.messages import Route, Weights
from protocol.weights import TensorSpec, differing

STILL_PULLED_S = 10.0
_REMEMBERED_DIGESTS = 10_000
_REMEMBERED_TENSOR_DIGESTS = 16
"""Versions; those of a large model are 10 kB and more each."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """All weights of one version, packed as `protocol.weights` describes."""

    version: int
    packed: torch.Tensor
    """uint8 [num_bytes] in CPU memory."""
    digests: bytes
    """One for every parameter, in the order of the manifest."""
    digest: str
    """One for them all."""
    specs: Sequence[TensorSpec]
    path: str
    """See `learner.weights.pack.Memory`."""

    def announcement(self, route: Route) -> Weights:
        """Return what an actor is told; for a collective `learner.weights.epochs` adds the rest."""
        return Weights(
            version=self.version,
            num_bytes=len(self.packed),
            digest=self.digest,
            shared=self.path if route == "shared" else "",
        )


class SnapshotStore:
    """Keeps at most two snapshots, whatever the number of actors that are behind."""

    def __init__(self, first: Snapshot, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._kept: dict[int, Snapshot] = {first.version: first}
        self._pulled_at: dict[int, float] = {}
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._tensor_digests: OrderedDict[int, bytes] = OrderedDict()
        self._latest = first
        self._remember(first)

    @property
    def latest(self) -> Snapshot:
        """The newest version."""
        return self._latest

    def publish(self, snapshot: Snapshot) -> None:
        """Make ``snapshot`` the newest; the oldest that is being pulled stays beside it."""
        with self._lock:
            now = self._clock()
            pulled = [v for v in self._kept if now - self._pulled_at.get(v, -1e9) < STILL_PULLED_S]
            keep = pulled[:1]
            # Memory goes with the last reference, which may take long: after the lock.
            before = self._kept
            self._kept = {v: before[v] for v in keep} | {snapshot.version: snapshot}
            self._pulled_at = {v: self._pulled_at[v] for v in keep}
            self._remember(snapshot)
            self._latest = snapshot

    def kept(self, version: int) -> Snapshot | None:
        """Return a snapshot, if it is not gone."""
        return self._kept.get(version)

    @property
    def is_pulled(self) -> bool:
        """Whether somebody pulls now."""
        with self._lock:
            now = self._clock()
            return any(now - at < STILL_PULLED_S for at in self._pulled_at.values())

    def pulled(self, version: int) -> Snapshot | None:
        """Return a snapshot that somebody is pulling now; None if it is gone."""
        with self._lock:
            snapshot = self._kept.get(version)
            if snapshot is not None:
                self._pulled_at[version] = self._clock()
            return snapshot

    def digest(self, version: int) -> str | None:
        """Return the digest of a version; None if it was never published, or very long ago."""
        return self._digests.get(version)

    def wrong_tensors(self, version: int, digests: bytes) -> list[str]:
        """Return the names of the parameters of a version that should have other digests.

        Empty if the version is neither kept nor one of the last few, or they are not as many.
        """
        kept = self._kept.get(version)
        ours = kept.digests if kept is not None else self._tensor_digests.get(version)
        if ours is None or len(ours) != len(digests):
            return []
        return differing(self._latest.specs, ours, digests)

    def _remember(self, snapshot: Snapshot) -> None:
        self._digests[snapshot.version] = snapshot.digest
        if len(self._digests) > _REMEMBERED_DIGESTS:
            self._digests.popitem(last=False)
        self._tensor_digests[snapshot.version] = snapshot.digests
        if len(self._tensor_digests) > _REMEMBERED_TENSOR_DIGESTS:
            self._tensor_digests.popitem(last=False)
