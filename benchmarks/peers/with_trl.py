"""A program: trains one case with TRL, and writes how long everything took.

    python -m benchmarks.peers.with_trl CASE.json BATCHES.jsonl

Departures from TRL's defaults, each in its favour or for equal work: no gradient checkpointing
(slower), no checkpoints, float32 in place of bfloat16, and rewards normalised one by one before
they are added up, which TRL has as an option. A SIGTERM ends it after the batch at hand.
"""

import importlib
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from datasets import load_dataset
from transformers import TrainerCallback, TrainerControl
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.cases import REWARDS, Case


class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes a line for each batch: when it ended, and what the time went into since the start."""

    def __init__(self, case: Case, lines: TextIO) -> None:
        self._case = case
        self._lines = lines
        self._started = 0.0
        self._seconds = {"generation": 0.0, "rewards": 0.0}
        self._tokens = 0
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def watch(self, trainer: Any) -> None:
        """Time what is no training; log-probabilities before the first step of a batch are."""
        self._wrap(trainer, "_generate_single_turn", "generation")
        self._wrap(trainer, "_calculate_rewards", "rewards", self._count_tokens)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._case.optimizer_steps:
            return
        line = {
            "seconds": time.perf_counter() - self._started,
            **self._seconds,
            "tokens": self._tokens,
        }
        print(json.dumps(line), file=self._lines, flush=True)
        control.should_training_stop = control.should_training_stop or self._stop

    def _wrap(
        self, trainer: Any, name: str, part: str, note: Callable[..., None] | None = None
    ) -> None:
        inner = getattr(trainer, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = inner(*arguments, **named)
            self._seconds[part] += time.perf_counter() - started
            if note is not None:
                note(*arguments)
            return result

        setattr(trainer, name, timed)

    def _count_tokens(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> None:
        self._tokens += sum(map(len, ids))

    def _on_signal(self, *_: Any) -> None:
        self._stop = True


def main() -> None:
    case, lines = Case.read(Path(sys.argv[1])), Path(sys.argv[2])
    with lines.open("w") as output:
        clock = Clock(case, output)
        trainer = make_trainer(case, lines.parent, clock)
        clock.watch(trainer)
        trainer.train()


def make_trainer(case: Case, folder: Path, clock: Clock) -> Any:
    data: Any = load_dataset("json", data_files=case.rows, split="train", cache_dir=str(folder))
    return GRPOTrainer(
        model=case.model,
        reward_funcs=[function_of(path) for path in REWARDS.values()],
        args=make_config(case, folder),
        train_dataset=data,
        callbacks=[clock],
    )


def make_config(case: Case, folder: Path) -> Any:
    return GRPOConfig(
        output_dir=str(folder),
        # A batch is generated at once and trained on in so many parts, an optimiser step each.
        per_device_train_batch_size=case.samples // case.optimizer_steps,
        steps_per_generation=case.optimizer_steps,
        gradient_accumulation_steps=1,
        max_steps=case.batches * case.optimizer_steps,
        num_generations=case.rollouts,
        max_completion_length=case.max_tokens,
        temperature=1.0,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        multi_objective_aggregation="normalize_then_sum",
        bf16=case.dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )


def function_of(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


if __name__ == "__main__":
    main()
