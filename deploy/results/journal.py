"""``gdpo journal``: what the journal of a run holds, and whether training on it gives the same."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from learner.records import Step
from learner.replay.journal_reader import JournalReader
from learner.run_folder import RunFolder
from protocol.messages import GroupHeader


def print_journal(run: Path) -> None:
    """A line for each group, then one for each change to the rewards; raises `ConfigError`."""
    journal = JournalReader.open(RunFolder(run).journal)
    steps: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    batches = journal.batches()
    for batch in batches:
        for prompt_index in batch.prompt_indices:
            steps.setdefault(prompt_index, []).append(batch.step)
        ends |= dict(batch.evicted)
    num_groups = 0
    for prompt_index, header, frames in journal.headers():
        num_groups += 1
        used = ", ".join(f"trained at step {step}" for step in steps.get(prompt_index, ()))
        end = used or (f"evicted: {ends[prompt_index]}" if prompt_index in ends else "not used yet")
        print(f"{_describe(prompt_index, header, frames)}; {end}")
    for command in journal.commands():
        print(f"rewards from step {command.from_step} on: {json.dumps(command.updates)}")
    span = f"steps {batches[0].step} to {batches[-1].step}" if batches else "no step"
    print(f"{num_groups} groups; the batches of {span}")


def replay_journal(run: Path) -> bool:
    """Train again on what it holds and print each loss beside the one that was recorded.

    Returns whether they all agree. Raises `ConfigError`.
    """
    from learner.recovery.resume import replay
    from learner.training.trainer import StepResult

    folder = RunFolder(run)
    losses = {step.step: step.metrics.get("loss") for step in _steps(folder)}
    differences: list[float] = []
    console = Console(highlight=False)

    def show(step: StepResult) -> None:
        then, now = losses.get(step.version), step.metrics["loss"]
        if then is None:
            console.print(f"step {step.version}: loss {now:.6g}, not recorded before")
            return
        differences.append(abs(now - then))
        verdict = "the same" if now == then else f"[bold]{now - then:+.2g}[/bold]"
        console.print(f"step {step.version}: loss {then:.6g} then, {now:.6g} now: {verdict}")

    replay(folder, folder.read_config(), show)
    largest = max(differences, default=0.0)
    console.print(f"{len(differences)} steps trained again; largest difference {largest:.2g}")
    return largest == 0.0


def _describe(prompt_index: int, header: GroupHeader, frames: list[memoryview]) -> str:
    _, lengths, _, _, spans, scores = frames
    versions = np.frombuffer(spans, "<i4").reshape(-1, 3)[:, 2]
    with warnings.catch_warnings():
        # A reward that applies to no rollout has no mean.
        warnings.simplefilter("ignore", RuntimeWarning)
        means = np.nanmean(_scores(scores, header), axis=0)
    rewards = ", ".join(
        f"{name} {mean:.3f}" for name, mean in zip(header.reward_names, means, strict=True)
    )
    return (
        f"prompt {prompt_index} (lease {header.lease}): {len(header.finish)} rollouts, "
        f"{int(np.frombuffer(lengths, '<i4').sum())} tokens, "
        f"versions {versions.min()} to {versions.max()}, {rewards}"
    )


def _scores(frame: memoryview, header: GroupHeader) -> Any:
    return np.frombuffer(frame, "<f4").reshape(-1, len(header.reward_names))


def _steps(folder: RunFolder) -> list[Step]:
    """The steps with metrics; none if the run has not written any yet."""
    return folder.read_steps() if folder.num_steps else []
