"""The same groups with prompts shared, packed one by one, and padded: time, memory, equality."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.attention import LOOP, check
from benchmarks.gpu.model import PADDED, TINY_VOCABULARY, VOCABULARY, Learner, place
from benchmarks.gpu.report import Report, Skip
from benchmarks.gpu.rows import make_trees
from benchmarks.gpu.timing import measure
from learner.packing.rows import Rows, packed_row
from learner.packing.trees import TokenTree

SHAPES = ((512, 200, 4, 6), (256, 1000, 8, 1), (64, 2000, 16, 1))
"""Tokens of a prompt, mean tokens of a completion, rollouts, and groups."""
TINY = ((8, 6, 3, 2),)


def report(row: Report, _: str, dry: bool) -> None:
    """Time forward and backward of the 0.5B shape in each layout."""
    kernel = best_kernel(dry)
    packed, padded = Learner("0.5B", kernel, dry=dry), Learner("0.5B", PADDED, dry=dry)
    for prompt, mean, rollouts, count in TINY if dry else SHAPES:
        lengths = [(prompt, spread(mean, rollouts, group)) for group in range(count)]
        trees = make_trees(lengths, TINY_VOCABULARY if dry else VOCABULARY)
        name = f"{count} x ({prompt}, {mean}, {rollouts}), {kernel}"
        compare(row, name, trees, packed, padded)


def best_kernel(dry: bool) -> str:
    """Return torch's own, where it works, else the loop."""
    device, dtype = place(dry)
    layout = packed_row(make_trees([(4, [3, 2])], 100), device).layout
    assert layout is not None
    try:
        check("varlen", layout, device, dtype)
    except (Skip, ImportError):
        return LOOP
    return "varlen"


def spread(mean: int, count: int, seed: int) -> list[int]:
    """Return lengths with a lognormal spread of a half around the mean, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    factors = (0.5 * torch.randn(count, generator=generator) - 0.125).exp()
    return [max(1, round(mean * factor)) for factor in factors.tolist()]


def compare(
    report: Report, name: str, trees: Sequence[TokenTree], packed: Learner, padded: Learner
) -> None:
    """Report a row for each layout; differences are to the first one's log-probabilities."""
    chains = [chain for tree in trees for chain in tree.chains()]
    runs: dict[str, tuple[Learner, Rows]] = {
        "shared": (packed, packed.rows(trees)),
        "packed": (packed, packed.rows(chains)),
        "padded": (padded, padded.rows(chains)),
    }
    expected: Tensor | None = None
    for layout, (learner, rows) in runs.items():
        try:
            with torch.no_grad():
                found = learner.logprobs(rows)
            seconds, memory = forward_and_backward(learner, rows)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            report(f"{name}, {layout}", memory="does not suffice")
            continue
        expected = found if expected is None else expected
        report(
            f"{name}, {layout}",
            tokens=f"{rows.tokens_RL.numel():,}",
            s=f"{seconds:.3f}",
            memory=f"{memory:.1f} GiB",
            difference=f"{(found - expected).abs().max().item():.1e}",
        )


def forward_and_backward(learner: Learner, rows: Rows) -> tuple[float, float]:
    """Return seconds and GiB."""

    def run() -> None:
        learner.logprobs(rows).mean().backward()  # type: ignore[no-untyped-call]
        learner.forget()

    return measure(run, warm_up=1, repeats=3)
