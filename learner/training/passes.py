"""From groups of a batch to the passes in which a rank computes them."""

from dataclasses import dataclass

import torch

from learner.packing.budget import Budget
from learner.packing.forward import Forward, Way
from learner.packing.rows import Rows
from learner.packing.split import Work, split
from learner.packing.trees import NOTHING
from learner.training.batch import Batch
from learner.training.ranks import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """Shares groups out to passes that fit into memory, and these to ranks."""

    forward: Forward
    way: Way
    budget: Budget
    work: Work
    device: torch.device
    ranks: Ranks

    def of(self, batch: Batch, places_p: torch.Tensor) -> list[Rows]:
        """Lay this rank's share of the groups at these places out; as many passes on all ranks."""
        trees, ranks = [batch.trees[p] for p in places_p.tolist()], self.ranks
        parts = split(trees, self.way, self.budget, self.work, ranks.size) if trees else []
        own = parts[ranks.rank :: ranks.size]
        passes = [self.forward.rows(part or [NOTHING], self.device) for part in own]
        # A prompt alone teaches nothing, but other ranks may wait for whoever has it.
        return [rows for rows in passes if len(rows.target_N) or ranks.size > 1]
