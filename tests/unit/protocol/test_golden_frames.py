"""The bytes of every message are those of the golden files: another language may rely on them."""

import pytest

from tests.unit.wire_examples import (
    EXAMPLES,
    FRAMES,
    GOLDEN,
    decoder_of,
    golden_file,
    golden_frames,
    golden_text,
    name_of,
)

HINT = (
    "the protocol differs from its golden frames. If that is meant: `make golden-frames` writes "
    "them anew, and PROTOCOL_VERSION is to be raised if a peer of the old version could misread "
    "the new bytes"
)


def test_every_type_of_message_has_golden_frames():
    assert {path.stem for path in GOLDEN.iterdir()} == FRAMES.keys(), HINT


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_encoding_gives_exactly_the_golden_bytes(example):
    name = name_of(example)
    assert golden_frames(name) == [bytes(frame) for frame in FRAMES[name]], HINT
    # What is there to be read is what the bytes say.
    assert golden_file(name).read_text() == golden_text(name), HINT


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_decoding_the_golden_bytes_gives_the_example(example):
    frames = golden_frames(name_of(example))
    header, payloads = decoder_of(example)(frames)
    sizes = tuple(len(frame) for frame in frames[1:])
    assert header == type(example)(**{**fields(example), "sizes": sizes}), HINT
    assert [bytes(payload) for payload in payloads] == frames[1:]


def fields(example):
    return {name: getattr(example, name) for name in example.__struct_fields__}
