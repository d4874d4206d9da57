"""The messages between actors and learner, as typed headers.

A message on the wire is one small msgpack header, ``{"type": ..., <fields>, "sizes": [...]}``,
followed by ``len(sizes)`` raw payload frames of exactly those sizes in bytes (see
`protocol.framing`). Arrays never go through msgpack: token ids, log-probabilities, scores and
weights are payload frames.

    actor -> learner    Hello  GroupHeader  Failed  Status  WeightsPull  WeightsReady  Goodbye
    learner -> actor    Welcome  Lease  Ack  Weights  WeightsChunk  Pong  Drain  Error
"""

from typing import Annotated, Any, Literal

import msgspec

PROTOCOL_VERSION = 4
"""Raised whenever a peer of the old version could misread a message of the new one."""

MAX_LEASES = 8192
"""Leases that one actor may hold at once."""

Purpose = Literal["check", "train", "eval"]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""A duration: neither negative nor NaN nor infinite."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Version = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""Version of the policy: one for each step, from 0. An int32 in the version spans of a group."""
Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Label = Annotated[
    str,
    msgspec.Meta(
        max_length=255,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]*\Z",
    ),
]
"""A name, shown in logs as it is: no control characters, which could forge lines of a log."""
SharedMemory = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^(/proc/[0-9]+/fd/[0-9]+)?\Z")]
"""An open file of another process of this machine."""
Session = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[!-~]*\Z")]
"""ASCII without spaces, as it is a ZeroMQ routing id too."""
MAX_PAYLOADS = 63
"""Payload frames of one message."""
Verdict = Literal["accepted", "duplicate", "rejected"]
FinishReason = Literal["stop", "length"]
Route = Literal["collective", "shared", "stream"]
"""Route of weights to an actor: broadcast, the memory of the same machine, or pulled chunks."""


MAX_TEMPERATURE = 1e6
MAX_WORLD_SIZE = 65_536
MAX_COLLECTIVE_S = 86_400.0
"""Longest deadline of a collective. The learner's configuration keeps to these limits; an actor
believes nothing beyond them."""

MODEL_FILE_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Configuration and tokenizer files that a welcome may bring: data, never code."""


class Header(
    msgspec.Struct, kw_only=True, frozen=True, tag_field="type", forbid_unknown_fields=True
):
    """Base of all headers."""

    sizes: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_PAYLOADS)] = ()
    """Bytes of each payload frame that follows; filled in by `protocol.framing.encode`."""


# --- actor -> learner ---------------------------------------------------------------------------


class Hello(Header, tag="hello", frozen=True):
    """First message of a session; answered by `Welcome` or `Error`.

    Example:
        An actor on the learner's machine, before it has joined::

            Hello(protocol=4, session="5f0c...", host="gpu-7", pid=4711, metrics_port=40123,
                  machine="1b2e.../4026531836/1000", gpu="GPU-8f5c...")
    """

    protocol: Count
    session: Session
    """Random in every process: ZeroMQ silently ignores the second of two peers with one id."""
    run_id: Label | None = None
    """The run that the actor was built for, when it says hello again after a silence."""
    model_digest: Label | None = None
    """`Welcome.model_digest` that the actor was built from, likewise."""
    host: Label = ""
    pid: Count = 0
    metrics_host: Label = ""
    """Not believed: the learner puts the address that the message came from in its place."""
    metrics_port: Port = 0
    machine: Label = ""
    """`protocol.machine.machine_id`: an actor on the learner's machine can read its memory."""
    gpu: Label = ""
    """UUID of the GPU that it receives weights on; empty if it has none, or cannot use NCCL."""


class GroupHeader(Header, tag="group", frozen=True):
    """A finished group; the arrays are the payload frames that `protocol.groups` lists.

    Example:
        Two rollouts of 3 and 5 tokens for a prompt of 4, scored by two rewards::

            GroupHeader(lease=17, reward_names=("format", "correctness"),
                        finish=("stop", "length"), generation_seconds=1.5, reward_seconds=0.02,
                        sizes=(16, 8, 32, 32, 24, 16))
    """

    lease: Count
    reward_names: tuple[str, ...]
    finish: tuple[FinishReason, ...]
    generation_seconds: Seconds
    reward_seconds: Seconds
    missing: dict[str, str] = {}
    """Rewards that failed on this group and do not apply to it (``on_failure = "missing"``), by
    name, with the cause."""


class Failed(Header, tag="failed", frozen=True):
    """The lease will not be fulfilled. A failed rollout is never a zero reward.

    Example:
        ``Failed(lease=17, kind="reward", cause="reward 'judge' took longer than 60 s ...",
        reward="judge")``
    """

    lease: Count
    kind: Literal["reward", "prompt", "deadline"]
    """Cause of the failure: a reward function, the data row, or the time that it took."""
    cause: str
    reward: str = ""
    """Name of the reward that failed, where one did."""


class Status(Header, tag="status", frozen=True):
    """Heartbeat, sent while the engine makes progress or has nothing to do; see `Pong`.

    Example:
        An actor that could hold 16 leases, holds two, and loads its next weights::

            Status(sequence=120, capacity=16, version=9, loading=10, leases=(17, 18), heard=119,
                   tokens_generated=81_920, groups_generated=40, idle_seconds=2.5,
                   stall_seconds=0.4, uptime_seconds=61.0)
    """

    sequence: Count
    capacity: Annotated[int, msgspec.Meta(ge=0, le=MAX_LEASES)]
    """Leases the actor can hold at once; 0 until its engine has weights, and while draining."""
    version: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
    """Policy version that the engine samples from; -1 before the first one."""
    loading: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
    """Version all bytes of which have arrived, until it is confirmed by `WeightsReady`; -1 without
    one. So the learner need not bound the time of a load to find an actor that hangs."""
    leases: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_LEASES)]
    """Leases that it works on, or whose group is not acknowledged yet."""
    heard: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
    """Sequence of the last `Pong` that it got; -1 before the first.

    Messages keep their order, so a lease that was sent before that answer and is not listed was
    lost on the way."""
    tokens_generated: Count
    """Tokens since the start of the process, which the four below count from too."""
    groups_generated: Count
    idle_seconds: Seconds
    """Time in which the engine had nothing to generate."""
    stall_seconds: Seconds
    """Time in which generation stood still to load weights."""
    uptime_seconds: Seconds


class WeightsPull(Header, tag="weights_pull", frozen=True):
    """Ask for chunk number ``chunk`` of the packed weights of ``version``.

    Example:
        ``WeightsPull(version=9, chunk=2, base=8)``: the third MiB, as its difference to version 8.
    """

    version: Version
    chunk: Count
    base: Version | None = None
    """Version of the bytes that the actor has there: the difference to them will do."""


class WeightsReady(Header, tag="weights_ready", frozen=True):
    """The engine now samples from ``version``, and its parameters have this digest.

    Payload frame: the digests of the single tensors (see `protocol.weights`).
    """

    version: Version
    digest: Label
    route: Route
    receive_seconds: Seconds
    load_seconds: Seconds


class Goodbye(Header, tag="goodbye", frozen=True):
    """The actor leaves; its unfinished leases are to be issued again."""

    cause: str


# --- learner -> actor ---------------------------------------------------------------------------


class Welcome(Header, tag="welcome", frozen=True):
    """Everything an actor needs. Payload frames: the files of the model folder, in order.

    Example:
        ``files=("config.json", "tokenizer.json")`` with two payload frames, and
        ``manifest=(("embed.weight", "bfloat16", (55, 64)), ...)``.
    """

    run_id: Label
    actor: dict[str, Any]
    """The resolved `protocol.config.ActorConfig`."""
    model_digest: Label
    files: tuple[Label, ...]
    """Names of config and tokenizer files (no weights); plain names, no folders."""
    manifest: tuple[tuple[Label, Label, tuple[Count, ...]], ...]
    """(name, dtype, shape) of every tensor, in the order in which weights are packed."""


class Lease(Header, tag="lease", frozen=True):
    """One prompt row to be rolled out ``num_rollouts`` times.

    Example:
        Eight rollouts for a row of the training data::

            Lease(lease=17, row={"prompt": "2 + 2 =", "answer": "4"}, prompt_id="train/0/5",
                  seed=9001, num_rollouts=8, temperature=1.0, max_tokens=1024, purpose="train",
                  deadline_s=600.0)
    """

    lease: Count
    row: dict[str, Any]
    """The data set's columns; ``prompt`` is a string or a list of chat messages."""
    prompt_id: Label
    seed: Count
    num_rollouts: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    temperature: Annotated[float, msgspec.Meta(ge=0, le=MAX_TEMPERATURE)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    purpose: Purpose
    deadline_s: Seconds
    """Seconds from receipt after which the learner issues the row again, and an actor may drop it.
    Where `Status.tokens_generated` does not grow, the learner does so earlier."""


class Ack(Header, tag="ack", frozen=True):
    """The final answer to a group.

    Example:
        ``Ack(lease=17, verdict="duplicate", cause="lease 17 is settled")``
    """

    lease: Count
    verdict: Verdict
    cause: str = ""


class Weights(Header, tag="weights", frozen=True):
    """A new version exists. Payload frame: the digests of its tensors (see `protocol.weights`).

    With an ``epoch`` it is broadcast, with ``shared`` it lies in this machine's memory. Without
    them, or if these fail, it is pulled.

    Example:
        A broadcast to two actors, of which this one has rank 2, in three buckets::

            Weights(version=9, num_bytes=40_000_000, digest="c0ffee...", epoch=4, backend="nccl",
                    rank=2, world_size=3, store_port=40321, bucket_bytes=16_777_216,
                    timeout_s=60.0)
    """

    version: Version
    num_bytes: Count
    digest: Label
    shared: SharedMemory = ""
    """File that holds the packed weights, until they are replaced by another version's."""
    epoch: Count | None = None
    """The collective to receive it in; the fields below belong to it."""
    backend: Literal["gloo", "nccl"] = "gloo"
    rank: Count = 0
    world_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_WORLD_SIZE)] = 0
    store_port: Port = 0
    bucket_bytes: Count = 0
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_COLLECTIVE_S)] = 0.0


class WeightsChunk(Header, tag="weights_chunk", frozen=True):
    """Answer to `WeightsPull`. Without a payload frame the version is gone.

    Otherwise there is one frame, the chunk, or with a ``base`` its differences from that version
    on, to be applied in order (see `protocol.chunk_codec`).

    Example:
        ``WeightsChunk(version=9, chunk=2, base=7, checksum="9f3a...", sizes=(52_100, 49_800))``:
        the differences from 7 to 8 and from 8 to 9.
    """

    version: Version
    chunk: Count
    base: Version | None = None
    encoding: Literal["raw", "zstd"] = "raw"
    """Encoding of a whole chunk."""
    checksum: Label = ""
    """Checksum of the chunk's bytes in ``version``."""


class Pong(Header, tag="pong", frozen=True):
    """Answer to `Status`: the learner is alive."""

    sequence: Count
    version: Version


class Drain(Header, tag="drain", frozen=True):
    """The run is over: finish nothing more. The actor says `Goodbye` and exits with 0."""

    cause: str


class Error(Header, tag="error", frozen=True):
    """Refusal of what the peer sent.

    Example:
        ``Error(code="unknown_session", message="...")`` to an actor that was given up; it says
        `Hello` again.
    """

    code: Literal["unknown_session", "refused", "bad_message"]
    message: str


ToLearner = Hello | GroupHeader | Failed | Status | WeightsPull | WeightsReady | Goodbye
ToActor = Welcome | Lease | Ack | Weights | WeightsChunk | Pong | Drain | Error
