"""Work made from rows: the endless seeded stream of prompts, evaluations and checks."""

from collections.abc import Sequence

import numpy as np

from learner.config.run import RunConfig
from learner.prompts.rows import Row
from protocol.errors import ConfigError
from protocol.leases import Work


class PromptStream:
    """Every row once an epoch, in an order that depends on seed and epoch only.

    A prompt has an index, its place in the stream: 0, 1, 2, ... without end.
    """

    def __init__(self, rows: list[Row], config: RunConfig) -> None:
        if not rows:
            raise ConfigError("the training data is empty")
        self.rows = rows
        self.next_prompt_index = 0
        self._config = config
        self._epoch = -1
        self._order: list[int] = []

    def next(self) -> Work:
        """Return the next prompt that was never leased; there is always one."""
        self.next_prompt_index += 1
        return self.work(self.next_prompt_index - 1)

    def work(self, prompt_index: int) -> Work:
        """Return the prompt with this index."""
        epoch, position = divmod(prompt_index, len(self.rows))
        if epoch != self._epoch:
            random = np.random.default_rng([self._config.seed, epoch])
            self._epoch, self._order = epoch, random.permutation(len(self.rows)).tolist()
        index = self._order[position]
        return Work(
            prompt_id=f"train/{epoch}/{index}",
            row=self.rows[index],
            seed=_seed(self._config.seed, 0, epoch, index),
            num_rollouts=self._config.sampling.num_rollouts,
            temperature=self._config.sampling.temperature,
            max_tokens=self._config.sampling.max_tokens,
            prompt_index=prompt_index,
        )


def evaluation_work(
    rows: Sequence[list[Row]], config: RunConfig, due: int
) -> dict[str, list[Work]]:
    """Return the held-out prompts of each set, with seeds that are the same at every evaluation.

    ``rows`` are those of ``config.heldout_sets``, in that order.
    """
    return {
        heldout.name: [
            Work(
                prompt_id=f"{heldout.name}/{due}/{index}",
                row=row,
                seed=_seed(config.seed, 1, number, index),
                num_rollouts=heldout.num_rollouts,
                temperature=heldout.temperature,
                max_tokens=config.sampling.max_tokens,
                purpose="eval",
            )
            for index, row in enumerate(set_rows[: heldout.prompts])
        ]
        for number, (heldout, set_rows) in enumerate(zip(config.heldout_sets, rows, strict=True))
    }


def check_work(row: Row, config: RunConfig) -> Work:
    """Return a few short sequences that show whether an actor computes what the learner does."""
    return Work(
        prompt_id="check",
        row=row,
        seed=_seed(config.seed, 2),
        num_rollouts=min(4, config.sampling.num_rollouts),
        temperature=config.sampling.temperature,
        max_tokens=min(64, config.sampling.max_tokens),
        purpose="check",
    )


def _seed(*parts: int) -> int:
    """A 63-bit seed; neighbours in any part give unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
