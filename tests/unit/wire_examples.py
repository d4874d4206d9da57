"""One example of every message, and the golden files that say what it looks like on the wire.

    python -m tests.unit.wire_examples      (or: make golden-frames)

writes `golden_frames/` anew. A file that changes is a protocol that changes: raise
`protocol.messages.PROTOCOL_VERSION` whenever a peer of the old version could misread the new bytes.
"""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec

from protocol import messages
from protocol.framing import Buffer, decode_to_actor, decode_to_learner, encode
from protocol.groups import pack_group
from protocol.messages import ToActor, ToLearner
from tests.unit.factories import make_group

GOLDEN = Path(__file__).parent / "golden_frames"
DECODERS = ((ToLearner, decode_to_learner), (ToActor, decode_to_actor))

LEASE = messages.Lease(
    lease=3,
    row={"prompt": [{"role": "user", "content": "hi"}], "answer": None, "level": 2.5},
    prompt_id="train/0/1",
    seed=2**63 - 1,
    num_rollouts=4,
    temperature=0.7,
    max_tokens=16,
    purpose="train",
    deadline_s=60.0,
)
STATUS = messages.Status(
    sequence=1,
    capacity=16,
    version=-1,
    loading=0,
    leases=(7, 2**40),
    heard=0,
    tokens_generated=10**12,
    groups_generated=3,
    idle_seconds=0.5,
    stall_seconds=0.25,
    uptime_seconds=9.0,
)
GROUP = pack_group(make_group(lease=3))

_WITH_PAYLOADS: tuple[tuple[messages.Header, list[Buffer]], ...] = (
    (
        messages.Hello(
            protocol=1,
            session="a",
            run_id="r/1",
            model_digest="d",
            host="h",
            pid=7,
            metrics_host="127.0.0.1",
            metrics_port=9401,
            machine="boot/4026531836/1000",
            gpu="GPU-1",
        ),
        [],
    ),
    GROUP,
    (messages.Failed(lease=3, kind="reward", cause="the reward raised", reward="format"), []),
    (STATUS, []),
    (messages.WeightsPull(version=2, chunk=1 << 20, base=1), []),
    (
        messages.WeightsReady(
            version=2, digest="d", route="collective", receive_seconds=0.5, load_seconds=0.1
        ),
        [bytes(range(16))],
    ),
    (messages.Goodbye(cause="SIGTERM"), []),
    (
        messages.Welcome(
            run_id="r/1",
            actor={"engine": "auto", "rewards": [{"name": "format"}]},
            model_digest="d",
            files=("config.json",),
            manifest=(("weight", "float32", (2, 3)), ("scalar", "bfloat16", ())),
        ),
        [b'{"eos_token_id": 1}'],
    ),
    (LEASE, []),
    (messages.Ack(lease=3, verdict="duplicate", cause="settled"), []),
    (
        messages.Weights(
            version=2,
            num_bytes=24,
            digest="d",
            shared="/proc/7/fd/12",
            epoch=1,
            backend="nccl",
            rank=2,
            world_size=3,
            store_port=29_500,
            bucket_bytes=1 << 20,
            timeout_s=10.0,
        ),
        [bytes(range(16))],
    ),
    (
        messages.WeightsChunk(version=2, chunk=8, base=1, encoding="raw", checksum="0f"),
        [bytes(range(16))],
    ),
    (messages.Pong(sequence=1, version=2), []),
    (messages.Drain(cause="the run is complete"), []),
    (messages.Error(code="refused", message="no"), []),
)
EXAMPLES = tuple(header for header, _ in _WITH_PAYLOADS)


def name_of(header: messages.Header) -> str:
    """The type as it is on the wire."""
    return str(header.__struct_config__.tag)


FRAMES = {name_of(header): encode(header, payloads) for header, payloads in _WITH_PAYLOADS}


def decoder_of(example: messages.Header) -> Any:
    [decode] = [decode for types, decode in DECODERS if type(example) in get_args(types)]
    return decode


def golden_file(name: str) -> Path:
    return GOLDEN / f"{name}.json"


def golden_text(name: str) -> str:
    """The header to read, and the bytes of every frame, 32 a line."""
    frames = [bytes(frame) for frame in FRAMES[name]]
    lines = [[frame[at : at + 32].hex(" ") for at in range(0, len(frame), 32)] for frame in frames]
    header = msgspec.msgpack.decode(frames[0])
    return json.dumps({"header": header, "frames": lines}, indent=2) + "\n"


def golden_frames(name: str) -> list[bytes]:
    """The frames that the file holds."""
    lines = json.loads(golden_file(name).read_text())["frames"]
    return [bytes.fromhex("".join(frame)) for frame in lines]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    for name in FRAMES:
        golden_file(name).write_text(golden_text(name))
    print(f"{len(FRAMES)} files in {GOLDEN}")
