"""What actors pull: chunks of the newest weights, or their differences from what an actor has.

Between two pushed versions a difference is made once, whoever asks for it. The differences of the
last pushes are kept, as far as they are small, and follow each other: an actor that has version 3
gets those to 4 and to 5.

    snapshots   3 ─────── 4 ─────── 5        only the newest, and at most one older, are in memory
    steps         3 to 4    4 to 5           one compressed patch a chunk
"""

from collections import deque
from dataclasses import dataclass, field
from threading import Lock

import msgspec

from learner.weights.snapshots import Snapshot, SnapshotStore
from protocol import chunk_codec
from protocol.framing import Buffer
from protocol.messages import WeightsChunk, WeightsPull
from protocol.weights import CHUNK_BYTES, num_chunks

MAX_STEPS = 16
MAX_SHARE = 0.5
"""Share of the weights' size that the patches of several versions together may take. Those to the
newest one stay, however large: actors are about to ask for them."""


@dataclass(slots=True, eq=False)
class _Step:
    """The differences between a version and the next one that was pushed."""

    previous: Snapshot | None
    """None, like ``new``, once all patches are made."""
    new: Snapshot | None
    versions: tuple[int, int]
    patches: list[bytes | None]
    size: int = 0
    next_chunk: int = 0
    """The first one that the background has not looked at."""


@dataclass(slots=True)
class Answer:
    """A chunk as it goes out."""

    header: WeightsChunk
    payloads: tuple[Buffer, ...] = ()
    plain_bytes: int = 0
    """Bytes of weights that it stands for."""


@dataclass(slots=True)
class ChunkSource:
    """Answers pulls; all methods but `keep_differences` are for one thread."""

    snapshots: SnapshotStore
    width: int
    """Bytes of one number."""
    compress: bool = False
    """Whether whole chunks are compressed, too."""
    _steps: deque[_Step] = field(default_factory=deque)
    _lock: Lock = field(default_factory=Lock)

    def keep_differences(self, previous: Snapshot, new: Snapshot) -> None:
        """Prepare the differences for actors that have ``previous`` and will pull ``new``."""
        chunks = num_chunks(len(new.packed))
        step = _Step(previous, new, (previous.version, new.version), [None] * chunks)
        with self._lock:
            # An unfinished one would keep a snapshot more in memory. Its chunks come in full.
            self._steps = deque((s for s in self._steps if s.new is None), MAX_STEPS)
            self._steps.append(step)

    def answer(self, pull: WeightsPull) -> Answer:
        """Return the chunk; without payload if the version is gone or has no such chunk."""
        snapshot = self.snapshots.pulled(pull.version)
        if snapshot is None or pull.chunk >= num_chunks(len(snapshot.packed)):
            return Answer(WeightsChunk(version=pull.version, chunk=pull.chunk))
        data = _chunk(snapshot, pull.chunk)
        header = WeightsChunk(
            version=pull.version, chunk=pull.chunk, checksum=chunk_codec.checksum(data)
        )
        if pull.base is not None:
            patches = self._chain(pull.base, pull.version, pull.chunk)
            if patches is not None and sum(map(len, patches)) < data.nbytes:
                header = msgspec.structs.replace(header, base=pull.base)
                return Answer(header, tuple(patches), data.nbytes)
        # A copy: a peer that does not read would keep a whole snapshot alive by one chunk of it.
        encoding, payload = chunk_codec.encode_full(bytes(data), self.width, compress=self.compress)
        return Answer(msgspec.structs.replace(header, encoding=encoding), (payload,), data.nbytes)

    def work(self) -> bool:
        """Make one patch that nobody has asked for yet; False if there is none to make.

        When all of a step are made, the snapshots are not needed for it any more.
        """
        with self._lock:
            step = self._steps[-1] if self._steps else None
        if step is None or step.new is None:
            return False
        if step.next_chunk < len(step.patches):
            self._patch(step, step.next_chunk)
            step.next_chunk += 1
            return True
        step.previous = step.new = None
        self._trim()
        return True

    def _chain(self, base: int, version: int, chunk: int) -> list[bytes] | None:
        """Patches that lead from one version to another, none between equal ones."""
        with self._lock:
            steps = list(self._steps)
        patches = []
        for step in steps:
            if step.versions[0] == base and base != version:
                patch = self._patch(step, chunk)
                if patch is None:
                    return None
                patches.append(patch)
                base = step.versions[1]
        return patches if base == version else None

    def _patch(self, step: _Step, chunk: int) -> bytes | None:
        """Return one patch, made when it is first needed."""
        if step.patches[chunk] is None and step.previous is not None and step.new is not None:
            before, after = _chunk(step.previous, chunk), _chunk(step.new, chunk)
            patch = chunk_codec.encode_patch(before, after, self.width)
            step.patches[chunk] = patch
            step.size += len(patch)
        return step.patches[chunk]

    def _trim(self) -> None:
        """Drop the oldest steps, but not the newest, when all together are too large."""
        with self._lock:
            limit = MAX_SHARE * len(self.snapshots.latest.packed)
            while len(self._steps) > 1 and sum(step.size for step in self._steps) > limit:
                self._steps.popleft()


def _chunk(snapshot: Snapshot, chunk: int) -> memoryview:
    begin = chunk * CHUNK_BYTES
    return snapshot.packed[begin : begin + CHUNK_BYTES].numpy().data
