"""Section ``[weights]``: how weights travel."""

from ipaddress import IPv4Address
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from protocol.config import StrictModel
from protocol.messages import MAX_COLLECTIVE_S
from protocol.weights import CHUNK_BYTES


class WeightsConfig(StrictModel):
    """The weight push."""

    backend: Literal["auto", "nccl", "gloo", "shared", "stream"] = "auto"
    """``nccl`` and ``gloo`` broadcast, without encryption or authentication: naming one says that
    the network is private. ``shared`` is for actors on this machine; with ``stream`` every actor
    pulls from the learner's socket. ``auto``: on loopback NCCL or gloo, beyond it ``stream``."""
    timeout_s: Annotated[float, Field(gt=0, le=MAX_COLLECTIVE_S)] = 10.0
    """Longest wait of a push without progress, in seconds: for actors to meet, for a bucket, for
    a confirmation. An actor that loads weights reports that with its state, which is progress."""
    push_timeout_s: Annotated[float, Field(gt=0, le=MAX_COLLECTIVE_S)] = 60.0
    """Longest push in seconds; actors that are later catch up by themselves."""
    push_every: PositiveInt = 1
    """Training batches between two pushes; the last version is pushed in any case.

    A push overlaps the next training steps by itself, at 1 too: it has a thread of its own, and
    actors go on generating. More than 1 saves the time of packing, sending and loading, and costs
    staleness: actors are up to push_every - 1 versions behind when a push begins. So
    training.max_staleness must be at least push_every + buffer.max_uses - 2; at exactly that
    nothing is leased while a push goes on.
    """
    bucket_bytes: Annotated[int, Field(gt=0, multiple_of=CHUNK_BYTES)] = 4 << 20
    """Bytes of weights in one broadcast call; whole MiB."""
    compress: bool = False
    """Compress weights that are pulled in full (differences always are): for slow links."""
    address: IPv4Address | None = None
    """IPv4 address of this machine where actors reach the broadcast; None: that of
    endpoints.bind."""


def is_ipv4(host: str) -> bool:
    """Whether this names one IPv4 address; that of all interfaces does not."""
    try:
        return not IPv4Address(host).is_unspecified
    except ValueError:
        return False
