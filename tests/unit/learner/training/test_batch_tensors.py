"""A batch on its way to the other ranks."""

import numpy as np
import torch

from learner.training.batch_tensors import from_bytes, to_tensors
from protocol.groups import GroupLimits
from tests.unit.factories import REWARDS, VOCAB, make_group

LIMITS = GroupLimits(
    num_rollouts=2,
    reward_names=REWARDS,
    vocab_size=VOCAB,
    max_prompt_tokens=8,
    max_tokens=8,
    newest_version=9,
)


def test_a_batch_arrives_as_it_was_sent():
    groups = [
        make_group(7, version=3, lengths=(1, 8), scores=[[0.5, float("nan")], [1.0, float("nan")]]),
        make_group(8, lengths=(3, 2)),
    ]
    advantages_PG = torch.tensor([[0.25, -1.5], [2.0, 1e-7]])
    tensors = to_tensors(groups, advantages_PG)
    payload = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    received, received_PG = from_bytes(payload, LIMITS)
    assert torch.equal(received_PG, advantages_PG)
    for sent, group in zip(groups, received, strict=True):
        assert group.lease == sent.lease
        assert np.array_equal(group.prompt_tokens, sent.prompt_tokens)
        assert np.array_equal(group.scores, sent.scores, equal_nan=True)
        for a, b in zip(sent.rollouts, group.rollouts, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.logprobs, b.logprobs)
            assert (a.spans, a.finish) == (b.spans, b.finish)
