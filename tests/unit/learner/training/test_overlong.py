"""Completions that were cut off."""

from dataclasses import replace

from learner.training.overlong import cut_off, trained_on
from protocol.groups import Group
from protocol.messages import FinishReason
from tests.unit.factories import make_group


def finished(*reasons: FinishReason) -> Group:
    group = make_group(lengths=[2] * len(reasons))
    rollouts = [replace(r, finish=f) for r, f in zip(group.rollouts, reasons, strict=True)]
    return replace(group, rollouts=tuple(rollouts))


GROUPS = [finished("stop", "length"), finished("length", "length")]


def test_what_was_cut_off_is_left_out_only_where_it_is_to_be_masked():
    cut_PG = cut_off(GROUPS)
    assert cut_PG.tolist() == [[False, True], [True, True]]
    assert trained_on(cut_PG, "mask").tolist() == [[True, False], [False, False]]
    assert trained_on(cut_PG, "keep").tolist() == [[True, True], [True, True]]
