"""What a learner on several ranks refuses before it meets them."""

import pytest

from learner.run.torchrun import joined
from learner.training.ranks import ALONE
from protocol.errors import ConfigError
from tests.unit.factories import make_config


@pytest.fixture
def three_ranks(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"optimizer": {"kind": "adamw_8bit"}}, 'set optimizer.kind = "adamw"'),
        ({"model": {"device": "cuda:1"}}, 'model.device = "cuda:1" is for one rank'),
        ({"training": {"shard_ranks": 2}}, "shard_ranks = 2 does not divide the 3 ranks"),
    ],
)
def test_what_several_ranks_cannot_do_is_said_at_once(three_ranks, sections, problem):
    with pytest.raises(ConfigError, match=problem), joined(make_config(**sections)):
        pass


def test_without_torchrun_there_is_nobody_to_meet(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(make_config()) as ranks:
        assert ranks is ALONE
        assert ranks.are_whole
