"""``gdpo eval``: score a model on the held-out prompts in this process.

The same prompts, seeds and sampling loop as the evaluations of a run, so a run's checkpoint gives
the figures of its summary.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from actors.engines.choice import start_engine
from actors.engines.engine import Engine, UnusableRow
from actors.rewards.pool import RewardFailure, RewardPool
from actors.rewards.scorer import RewardScorer
from actors.rollouts.single_turn import RolloutWorker
from learner.config.run import RunConfig
from learner.prompts.evaluation import Evaluation
from learner.prompts.rows import load_heldout
from learner.prompts.stream import evaluation_work
from learner.run.reports import evaluation_report
from learner.run_folder import RunFolder
from learner.training.policy import Policy, load_policy, load_tokenizer, with_dtype
from learner.weights.pack import pack_into
from protocol.errors import ConfigError, RewardError
from protocol.leases import LeaseBook, Work
from protocol.weights import total_bytes
from transfer.shared_memory import SharedMemory

IN_FLIGHT = 32


def evaluate(config: RunConfig, model: Path | None, allowed_modules: Sequence[str]) -> int:
    """Print the mean of every reward on every set, and pass@k; returns the exit code."""
    if not config.heldout_sets:
        raise ConfigError(
            "neither data.heldout nor eval.sets is set: there are no prompts to evaluate on"
        )
    if model is not None:
        if not model.is_dir():
            raise ConfigError(f"--model {model}: no such folder")
        if (run := RunFolder(model)).checkpoint.exists():
            model = run.checkpoint
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"path": str(model)})}
        )
    works = evaluation_work(load_heldout(config.heldout_sets), config, due=0)
    config = with_dtype(config)
    evaluation = Evaluation(works, due=0)
    asyncio.run(_evaluate(config, load_policy(config), evaluation, allowed_modules))
    result = evaluation_report(evaluation, config)
    if not any(found.prompts for found in result.sets.values()):
        failed = sum(found.failed_prompts for found in result.sets.values())
        raise RewardError(f"all {failed} prompts failed")
    for name, found in result.sets.items():
        left_out = f" ({found.failed_prompts} failed)" if found.failed_prompts else ""
        print(f"{name}: {found.prompts} prompts x {found.num_rollouts} rollouts{left_out}")
        for what, value in found.figures.items():
            print(f"  {what}: {'-' if value is None else f'{value:.4f}'}")
    return 0


async def _evaluate(
    config: RunConfig, policy: Policy, evaluation: Evaluation, allowed_modules: Sequence[str]
) -> None:
    pool = RewardPool(
        config.rewards,
        allowed_modules=allowed_modules,
        folder=Path.cwd(),
        timeout_s=config.actor.reward_timeout_s,
        processes=config.actor.reward_processes,
    )
    try:
        await pool.start()
        engine = await _start_engine(config, policy)
        try:
            worker = RolloutWorker(
                engine,
                load_tokenizer(policy),
                RewardScorer(config.rewards, pool),
                max_prompt_tokens=config.sampling.max_prompt_tokens,
                max_tokens=config.sampling.max_tokens,
            )
            await _roll_out(worker, evaluation, config)
        finally:
            await engine.close()
    finally:
        await pool.close()


async def _start_engine(config: RunConfig, policy: Policy) -> Engine:
    """An engine that holds the model."""
    largest = max(heldout.num_rollouts for heldout in config.heldout_sets)
    sampling = config.sampling.model_copy(update={"num_rollouts": largest})
    engine = await start_engine(
        policy.folder,
        config.for_actors().model_copy(update={"sampling": sampling, "max_leases": IN_FLIGHT}),
    )
    memory = SharedMemory(total_bytes(policy.specs), pinned=engine.pinned)
    pack_into(memory.tensor, policy.model, policy.specs)
    await engine.load_weights(0, memory, policy.specs)
    return engine


async def _roll_out(worker: RolloutWorker, evaluation: Evaluation, config: RunConfig) -> None:
    """Roll out and score all prompts; raises the failure of a reward that must not fail."""
    book = LeaseBook()
    room = asyncio.Semaphore(IN_FLIGHT)
    vital = {reward.name for reward in config.rewards if reward.on_failure == "error"}

    async def roll_out(work: Work) -> None:
        async with room:
            try:
                limit_s = config.deadlines.lease_timeout_s
                lease = book.issue(work, "gdpo eval", now=0.0, limit_s=limit_s)
                group = await worker.roll_out(lease)
            except (RewardFailure, UnusableRow) as error:
                if isinstance(error, RewardFailure) and error.reward in vital:
                    raise RewardError(f"{work.prompt_id}: {error}") from error
                print(f"{work.prompt_id} is left out: {error}", file=sys.stderr)
                evaluation.give_up(work)
                return
        evaluation.receive(work, group)

    tasks = [asyncio.create_task(roll_out(work)) for work in evaluation.waiting]
    console = Console(stderr=True)
    finished = asyncio.as_completed(tasks)
    try:
        for task in track(
            finished, "evaluating", total=len(tasks), console=console, transient=True
        ):
            await task
    finally:
        for unfinished in tasks:
            unfinished.cancel()
        await asyncio.wait(tasks)
