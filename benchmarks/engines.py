"""Inference engines side by side: tokens a second, and what a push of weights costs.

    python -P benchmarks/engines.py [--hidden 512 --layers 8] [--steps 40]
    python -P benchmarks/engines.py --recompute [--model FOLDER]
    python -P benchmarks/engines.py --steady [--hidden 128 --layers 3]

Prints, in one run on one machine: tokens a second of the `transformers` and the vLLM engine for 1,
8 and 64 prompts of 8 samples, each engine with one CPU thread (or on the GPU, where there is one);
then the phases of a weight push and the share of the time that actors stood still for it, from a
run of `gdpo run` with each engine on the recipe of the demo. Needs vLLM: use its environment.

With ``--recompute`` only this, without vLLM: the time that the `transformers` engine takes to
compute 64 rows anew after a push, against one pass over all rows, each with its prompt; in turns,
the medians.

With ``--steady`` only this, without vLLM: tokens that the `transformers` engine makes in a second
of CPU time with so many groups of 4 samples in flight, where one joins whenever another ends, and
where all of them begin together; completions are of 12 to 32 tokens; the best of three.

Weights are random, so that a completion always runs to its last token.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

# Before anything brings torch: one thread for each process, so that engines are compared.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from actors.engines.batch_generator import BatchGenerator
from actors.engines.choice import start_engine
from actors.engines.engine import Engine, Request
from learner.records import Summary
from learner.run_folder import RunFolder
from protocol.config import ActorConfig, SamplingConfig
from protocol.weights import layout, total_bytes
from transfer.shared_memory import SharedMemory

ROOT = Path(__file__).parent.parent
EngineName = Literal["transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = ("transformers", "vllm")
PROMPTS = (1, 8, 64)
SAMPLES = 8
PROMPT_TOKENS, NEW_TOKENS = 32, 64
ROWS = 64
GROUPS = 64
REPEATS = 3
PHASES = ("pack", "join", "broadcast", "confirm", "receive", "load")


def main() -> None:
    options = _parse()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    console = Console(highlight=False)
    if options.recompute:
        console.print(_recompute_table(options))
        return
    if options.steady:
        console.print(_steady_table(options))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _make_model(folder, options)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        rates = {engine: asyncio.run(_rates(engine, folder, model)) for engine in ENGINES}
    table = Table(
        title=f"tokens a second: {millions:.1f} M parameters, {SAMPLES} samples, {device}"
    )
    table.add_column("prompts", justify="right")
    for engine in (*ENGINES, "vllm / transformers"):
        table.add_column(engine, justify="right")
    for index, prompts in enumerate(PROMPTS):
        row = [rates[engine][index] for engine in ENGINES]
        table.add_row(str(prompts), *(f"{rate:,.0f}" for rate in row), f"{row[1] / row[0]:.2f}")
    console.print(table)
    console.print(_push_table(options.steps))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--hidden", type=int, default=256, help="size of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="of the runs with weight pushes")
    parser.add_argument("--recompute", action="store_true", help="only what a push costs rows")
    parser.add_argument("--steady", action="store_true", help="only groups that come and go")
    parser.add_argument("--model", type=Path, help="a real model for --recompute")
    return parser.parse_args()


def _make_model(folder: Path, options: argparse.Namespace) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 128),
        max_position_embeddings=512,
        eos_token_id=0,
        architectures=["Qwen2ForCausalLM"],
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    config.save_pretrained(folder)
    return model


async def _rates(name: EngineName, folder: Path, model: Qwen2ForCausalLM) -> list[float]:
    """Tokens a second for each of `PROMPTS`, after a warm-up."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if torch.cuda.is_available() else "float32"
    config = ActorConfig(
        engine=name,
        dtype=dtype,
        max_leases=max(PROMPTS),
        sampling=SamplingConfig(
            num_rollouts=SAMPLES, max_prompt_tokens=PROMPT_TOKENS, max_tokens=NEW_TOKENS
        ),
    )
    engine = await start_engine(folder, config)
    specs = layout((n, dtype, tuple(p.shape)) for n, p in model.named_parameters())
    memory = SharedMemory(total_bytes(specs), pinned=engine.pinned)
    for spec, parameter in zip(specs, model.parameters(), strict=True):
        raw = parameter.detach().to(getattr(torch, dtype)).contiguous().view(-1).view(torch.uint8)
        memory.tensor[spec.offset : spec.offset + spec.num_bytes] = raw
    await engine.load_weights(0, memory, specs)
    await _generate(engine, 2)
    rates = [await _generate(engine, prompts) for prompts in PROMPTS]
    await engine.close()
    return rates


async def _generate(engine: Engine, prompts: int) -> float:
    requests = [
        Request(
            prompt_tokens=tuple(1 + (31 * p + 7 * i) % 4095 for i in range(PROMPT_TOKENS)),
            num_rollouts=SAMPLES,
            temperature=1.0,
            max_tokens=NEW_TOKENS,
            seed=1000 * p,
        )
        for p in range(prompts)
    ]
    started = time.perf_counter()
    groups = await asyncio.gather(*(engine.generate(request) for request in requests))
    seconds = time.perf_counter() - started
    return sum(len(rollout.tokens) for group in groups for rollout in group) / seconds


def _recompute_table(options: argparse.Namespace) -> Table:
    """Seconds to compute `ROWS` rows anew, by the engine and in one pass, for several lengths."""
    with tempfile.TemporaryDirectory() as name:
        model: Any = _make_model(Path(name), options)
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    table = Table(
        title=f"{ROWS} rows computed anew, {millions:.0f} M parameters, float32, 1 thread"
    )
    columns = ("prompt", "completion", "one pass", "engine", "ratio", "tokens", "tokens", "ratio")
    for column in columns:
        table.add_column(column, justify="right")
    for prompt, completion in ((32, 32), (128, 64), (256, 32)):
        seconds = _recompute_seconds(model, prompt, completion)
        tokens = ROWS * (prompt + completion), ROWS // SAMPLES * prompt + ROWS * completion
        table.add_row(
            f"{prompt}",
            f"{completion}",
            *(f"{value:.2f} s" for value in seconds),
            f"{seconds[0] / seconds[1]:.1f}",
            *(f"{count:,}" for count in tokens),
            f"{tokens[0] / tokens[1]:.1f}",
        )
    return table


def _recompute_seconds(model: Any, prompt: int, completion: int) -> tuple[float, float]:
    """Medians of one pass over whole rows, and of the engine."""
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=ROWS)
    for key in range(ROWS // SAMPLES):
        tokens = tuple(
            1 + (31 * key + 7 * i) % (model.config.vocab_size - 1) for i in range(prompt)
        )
        generator.add(key, Request(tokens, SAMPLES, 1.0, completion + 8, seed=key))
    for _ in range(completion):
        generator.step()
    ids = torch.ones(ROWS, prompt + completion, dtype=torch.long)

    def one_pass() -> None:
        with torch.inference_mode():
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=True,
                logits_to_keep=torch.tensor([-1]),
            )

    times: tuple[list[float], list[float]] = ([], [])
    runs: tuple[Callable[[], None], ...] = (one_pass, partial(generator.weights_changed, 1))
    for _ in range(REPEATS):
        for run, seconds in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def _steady_table(options: argparse.Namespace) -> Table:
    """Tokens a second of CPU time for several numbers of groups in flight."""
    with tempfile.TemporaryDirectory() as name:
        model = _make_model(Path(name), options)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    table = Table(title=f"tokens a CPU second: {millions:.1f} M parameters, 4 samples, 1 thread")
    for column in ("groups in flight", "one by one", "together"):
        table.add_column(column, justify="right")
    for in_flight in (4, 8, 16, 32):
        rates = [
            max(_steady_rate(model, in_flight, together=together) for _ in range(REPEATS))
            for together in (False, True)
        ]
        table.add_row(str(in_flight), *(f"{rate:,.0f}" for rate in rates))
    return table


def _steady_rate(model: Any, in_flight: int, *, together: bool) -> float:
    """Of `GROUPS` groups and those in flight after them."""
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=4 * in_flight)
    keys = itertools.count()

    def add(groups: int) -> None:
        for key in itertools.islice(keys, groups):
            tokens = tuple(1 + (31 * key + 7 * i) % 4095 for i in range(PROMPT_TOKENS))
            generator.add(key, Request(tokens, 4, 1.0, 12 + 7 * key % 21, seed=key))

    add(in_flight)
    tokens, done, started = 0, 0, time.thread_time()
    while done < GROUPS:
        sampled, finished = generator.step()
        tokens, done = tokens + sampled, done + len(finished)
        if not together:
            add(len(finished))
        elif not generator.busy:
            add(in_flight)
    return tokens / (time.thread_time() - started)


def _push_table(steps: int) -> Table:
    """Phases of a push, in milliseconds, from the summaries of two real runs."""
    table = Table(title=f"weight push, 2 actors, mean of {steps} (ms; 0.3 M parameters)")
    table.add_column("engine")
    for column in (*PHASES, "actors stood still"):
        table.add_column(column, justify="right")
    for engine in ENGINES:
        summary = _run(("actor.engine=" + engine, f"training.steps={steps}"))
        seconds = summary.phase_seconds
        table.add_row(
            engine,
            *(f"{1000 * seconds[f'weights_{phase}']:.1f}" for phase in PHASES),
            f"{summary.weights.actors_stalled_share:.1%}",
        )
    return table


def _run(overrides: Sequence[str]) -> Summary:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "deploy", "run"),
                str(ROOT / "examples" / "tool_calling_tiny.toml"),
                "endpoints.bind=tcp://127.0.0.1:0",
                "endpoints.metrics_port=0",
                f"runs_folder={folder}",
                "name=benchmark",
                *overrides,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return RunFolder(Path(folder) / "benchmark").read_summary()


if __name__ == "__main__":
    main()
