"""Training on several ranks is training on one: real processes, with FSDP2 over gloo.

Within a process one rank trains alone first, and then all of them do together.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from learner.config.file import load_config
from learner.config.run import RunConfig
from learner.recovery.checkpoints import Checkpoint, Checkpoints, newest
from learner.recovery.resume import load_trainer
from learner.run.follower import follow
from learner.training.policy import Policy
from learner.training.ranks import ALONE, Order, Ranks
from learner.training.reward_settings import RewardSetting
from learner.training.trainer import StepResult
from learner.weights.pack import MemoryPool, pack
from protocol.groups import Group, Rollout
from protocol.weights import tensor_digest, total_bytes, whole_digest
from tests.unit.learner.recovery.test_checkpoints import make_state

DEADLINE = timedelta(seconds=60)
STEPS, NUM_PROMPTS, NUM_ROLLOUTS = 5, 6, 4
REWARDS = ("format", "correctness")


@dataclass(frozen=True)
class Case:
    """What a run is like, beyond the demo's recipe."""

    overrides: tuple[str, ...] = ()
    prompts: int = NUM_PROMPTS
    """Groups in a batch."""
    without_signal: int = 0
    """Groups of it whose rewards do not vary."""
    cut_off: int = 0
    """Rollouts of each group that reached the longest completion."""
    tolerance: float = 2e-4
    """Of losses and metrics, relative above 1. AdamW makes a whole step of what is only rounding
    where a gradient is 0 otherwise, and the largest ratio of all tokens shows it."""


CASES = {
    "the recipe": Case(),
    "many passes": Case(("training.microbatch_tokens=40",)),
    "few rows": Case(("training.minibatches=1",), prompts=1),
    "ranks without rows": Case(("training.minibatches=6", "algorithm.overlong=mask"), cut_off=3),
    "copies of shards": Case(("training.shard_ranks=2",)),
    "groups without signal": Case(without_signal=3),
    "layers computed again": Case(("training.activation_checkpointing=true",)),
    "a reference": Case(("algorithm.kl_coefficient=0.1", "algorithm.entropy_coefficient=0.01")),
    "sequences": Case(("algorithm.correction=gspo", "algorithm.aggregation=sequence_mean")),
    # Gradients are rounded to 8 bits before they are added up, in each rank and pass.
    "bfloat16": Case(("model.dtype=bfloat16",), tolerance=0.1),
    "lr by ess": Case(("algorithm.scale_lr_by_ess=true",)),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [2, 4])
def test_steps_of_several_ranks_are_those_of_one(size: int, recipe: Path, tmp_path: Path):
    # The errors of the processes are raised here.
    torch.multiprocessing.spawn(be_rank, (size, recipe, tmp_path), nprocs=size)
    print((tmp_path / "table").read_text())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_any_number_of_ranks(dtype: str, recipe: Path, tmp_path: Path):
    torch.multiprocessing.spawn(be_resumed, (dtype, recipe, tmp_path), nprocs=2)
    print((tmp_path / "table").read_text())


@pytest.mark.slow
def test_the_same_ranks_make_the_same_bits(recipe: Path, tmp_path: Path):
    torch.multiprocessing.spawn(be_repeated, (recipe, tmp_path), nprocs=2)


def be_rank(rank: int, size: int, recipe: Path, tmp_path: Path, backend: str = "gloo") -> None:
    ranks, lines = joined(rank, size, tmp_path, backend), []
    for name, case in CASES.items():
        config = configured(recipe, case, "cpu" if backend == "gloo" else "cuda")
        together = Run.of(config, case, ranks)
        if together is not None:
            lines.append(compare(name, case, config, Run.alone(config, case), together))
    if lines:
        (tmp_path / "table").write_text("\n".join(lines))
    dist.destroy_process_group()


def be_resumed(rank: int, dtype: str, recipe: Path, tmp_path: Path) -> None:
    ranks, lines = joined(rank, 2, tmp_path), []
    case = CASES["bfloat16" if dtype == "bfloat16" else "the recipe"]
    config = configured(recipe, case)
    for first, then in ((ranks, ranks), (ranks, ALONE), (ALONE, ranks)):
        folder = tmp_path / f"{first.size}-{then.size}"
        if rank < first.size:
            Run.of(config, case, first, range(2), save_to=folder)
        ranks.meet()
        if rank < then.size:
            run = Run.of(config, case, then, range(2, STEPS), newest(folder))
            if run is not None:
                never_stopped = Run.alone(config, case)
                never_stopped.results = never_stopped.results[2:]
                lines.append(compare(folder.name, case, config, never_stopped, run))
    if lines:
        (tmp_path / "table").write_text("\n".join(lines))
    dist.destroy_process_group()


def be_repeated(rank: int, recipe: Path, tmp_path: Path) -> None:
    ranks, case = joined(rank, 2, tmp_path), CASES["the recipe"]
    config = configured(recipe, case)
    runs = [Run.of(config, case, ranks) for _ in range(2)]
    if runs[0] is not None and runs[1] is not None:
        for one, other in zip(runs[0].results, runs[1].results, strict=True):
            assert one.metrics == other.metrics
        assert torch.equal(runs[0].weights, runs[1].weights)
    dist.destroy_process_group()


def joined(rank: int, size: int, tmp_path: Path, backend: str = "gloo") -> Ranks:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend,
        init_method=f"file://{tmp_path / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=DEADLINE,
    )
    return Ranks(rank, size)


def configured(recipe: Path, case: Case, device: str = "cpu") -> RunConfig:
    batch = (f"training.batch_groups={NUM_PROMPTS}", "training.minibatches=2")
    return load_config(recipe, [*batch, f"model.device={device}", *case.overrides])


@dataclass
class Run:
    """What steps have come to."""

    results: list[StepResult] = field(default_factory=list)
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(
        cls,
        config: RunConfig,
        case: Case,
        ranks: Ranks,
        steps: range = range(STEPS),
        checkpoint: Checkpoint | None = None,
        save_to: Path | None = None,
    ) -> "Run | None":
        """None for a rank that follows."""
        policy, trainer = load_trainer(config, checkpoint, ranks=ranks)
        assert trainer.version == steps.start
        if not ranks.leads:
            follow(ranks, config, policy, trainer)
            return None
        run = cls()
        for groups in batches(policy, case)[steps.start : steps.stop]:
            run.results.append(trainer.step(groups, setting(config)))
        if save_to is not None:
            ranks.order(Order.GATHER_STATE)
            checkpoints = Checkpoints(save_to, policy, keep=2)
            checkpoints.begin(make_state(trainer.version, trainer), trainer.state_tensors())
            checkpoints.finish()
        ranks.order(Order.GATHER_WEIGHTS)
        snapshot = pack(
            trainer.version, policy.model, policy.specs, MemoryPool(total_bytes(policy.specs))
        )
        run.weights = snapshot.packed.view(getattr(torch, policy.specs[0].dtype)).double()
        # What actors confirm is what a model of one rank would have.
        data = snapshot.packed.numpy()
        digests = [tensor_digest(data[s.offset :][: s.num_bytes].data) for s in policy.specs]
        assert snapshot.digest == whole_digest(b"".join(digests), policy.specs)
        ranks.order(Order.LEAVE)
        return run

    @classmethod
    def alone(cls, config: RunConfig, case: Case) -> "Run":
        run = cls.of(config, case, ALONE)
        assert run is not None
        return run


def batches(policy: Policy, case: Case) -> list[list[Group]]:
    """Batches of random groups of very different length, half sampled from an older version."""
    random, made = np.random.default_rng(0), []
    for step in range(STEPS):
        groups = []
        for lease in range(case.prompts):
            scores = random.random((NUM_ROLLOUTS, len(REWARDS))).astype(np.float32)
            if lease < case.without_signal:
                scores[:] = 1.0
            groups.append(
                Group(
                    lease=lease,
                    prompt_tokens=random.integers(2, policy.vocab_size, 2 + 3 * lease, np.int32),
                    rollouts=tuple(
                        rollout(policy, random, max(0, step - lease % 2), index < case.cut_off)
                        for index in range(NUM_ROLLOUTS)
                    ),
                    reward_names=REWARDS,
                    scores=scores,
                )
            )
        made.append(groups)
    return made


def rollout(policy: Policy, random: np.random.Generator, version: int, cut: bool) -> Rollout:
    length = int(random.integers(1, 16))
    return Rollout(
        tokens=random.integers(2, policy.vocab_size, length, np.int32),
        logprobs=-random.uniform(3, 5, length).astype(np.float32),
        spans=((0, version),),
        finish="length" if cut else "stop",
    )


def setting(config: RunConfig) -> RewardSetting:
    return RewardSetting(
        {r.name: r.weight for r in config.rewards}, {r.name: r.when for r in config.rewards}
    )


def compare(name: str, case: Case, config: RunConfig, alone: Run, together: Run) -> str:
    """Fail where they differ by more than rounding; a line of the table."""
    worst = 0.0, ""
    for one, all_ in zip(alone.results, together.results, strict=True):
        assert all_.metrics.keys() == one.metrics.keys(), name
        for metric, value in one.metrics.items():
            off = abs(all_.metrics[metric] - value) / max(abs(value), 1.0)
            worst = max(worst, (off, f"{metric} of step {one.version}"))
        assert all_.lag0_difference == pytest.approx(one.lag0_difference, abs=case.tolerance), name
    assert worst[0] < case.tolerance, f"{name}: {worst}"
    difference = (alone.weights - together.weights).abs()
    assert difference.mean() < max(1e-2, case.tolerance) * config.optimizer.lr, name
    last, all_last = alone.results[-1].metrics, together.results[-1].metrics
    return (
        f"{name:24} loss {last['loss']:.7f} {all_last['loss']:.7f}  "
        f"norm {last['grad_norm']:.6f} {all_last['grad_norm']:.6f}  "
        f"weights {difference.max():.1e} {difference.mean():.1e}  "
        f"worst metric {worst[0]:.1e}, {worst[1]}"
    )
