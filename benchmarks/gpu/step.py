"""Forward, backward and optimiser of a packed row, by one kernel of attention."""

import gc
from collections.abc import Sequence

import torch

from benchmarks.gpu.attention import check
from benchmarks.gpu.model import TINY_VOCABULARY, VOCABULARY, Learner, peak_tflops, place
from benchmarks.gpu.report import Report
from benchmarks.gpu.rows import make_trees
from benchmarks.gpu.timing import measure
from learner.packing.rows import packed_row
from learner.packing.trees import TokenTree

PROMPT, COMPLETION, ROLLOUTS = 512, 192, 8
"""A group of 2,048 tokens."""
CASES = (("1.5B", 8192), ("0.5B", 8192), ("1.5B", 32_768), ("0.5B", 32_768))
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}


def report(row: Report, kernel: str, dry: bool) -> None:
    """Compare the kernel with a plain one, then time a step of each case."""
    device, dtype = place(dry)
    short = packed_row(make_trees([(40, [30, 7, 64]), (5, [9, 1])], 100), device).layout
    assert short is not None
    difference = check(kernel, short, device, dtype)
    right = difference < TOLERANCE[dtype]
    row("against plain attention", difference=f"{difference:.1e}", right=right)
    if not right:
        raise RuntimeError(f"{kernel} differs by {difference:.1e}")
    for shape, tokens in CASES[: 1 if dry else None]:
        case(row, kernel, shape, packed(tokens, dry), dry)


def packed(tokens: int, dry: bool) -> list[TokenTree]:
    if dry:
        return make_trees([(8, [4, 4])], TINY_VOCABULARY)
    lengths = [(PROMPT, [COMPLETION] * ROLLOUTS)] * (tokens // (PROMPT + COMPLETION * ROLLOUTS))
    return make_trees(lengths, VOCABULARY)


def case(report: Report, kernel: str, shape: str, trees: Sequence[TokenTree], dry: bool) -> None:
    """Time it; where memory does not suffice, once more with activations computed twice."""
    name = f"{shape}, {sum(tree.num_tokens for tree in trees):,} tokens"
    for recompute in (False, True):
        try:
            time_step(report, name, kernel, shape, trees, recompute, dry)
            return
        except torch.cuda.OutOfMemoryError:
            report(f"{name}{', recomputed' * recompute}", memory="does not suffice")
        gc.collect()
        torch.cuda.empty_cache()


def time_step(
    report: Report,
    name: str,
    kernel: str,
    shape: str,
    trees: Sequence[TokenTree],
    recompute: bool,
    dry: bool,
) -> None:
    learner = Learner(shape, kernel, dry=dry)
    if recompute:
        learner.recompute()
    rows = learner.rows(trees)

    def step() -> None:
        learner.logprobs(rows).mean().backward()  # type: ignore[no-untyped-call]
        learner.update()

    seconds, memory = measure(step, warm_up=2, repeats=3)
    tflops = learner.flops(trees) / seconds / 1e12
    peak = peak_tflops()
    report(
        f"{name}{', recomputed' * recompute}",
        s=f"{seconds:.3f}",
        tokens_per_s=f"{rows.tokens_RL.numel() / seconds:,.0f}",
        TFLOPs=f"{tflops:.0f}",
        MFU=f"{tflops / peak:.0%}" if peak else "-",
        memory=f"{memory:.1f} GiB",
    )
