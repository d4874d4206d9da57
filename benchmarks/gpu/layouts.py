"""The same groups with prompts shared, packed one by one, and padded: time, memory, equality."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.attention import check
from benchmarks.gpu.model import PADDED, TINY_VOCABULARY, VOCABULARY, Learner, place
from benchmarks.gpu.report import Report, Skip
from benchmarks.gpu.rows import Group, make_groups, plain_row, shared_row
from benchmarks.gpu.timing import measure

SHAPES = ((512, 200, 4, 6), (256, 1000, 8, 1), (64, 2000, 16, 1))
"""Tokens of a prompt, mean tokens of a completion, rollouts, and groups."""
TINY = ((8, 6, 3, 2),)

Logprobs = Callable[[], Tensor]


def report(row: Report, _: str, dry: bool) -> None:
    """Time forward and backward of the 0.5B shape in each layout."""
    device, _dtype = place(dry)
    kernel = best_kernel(dry)
    packed, padded = Learner("0.5B", kernel, dry=dry), Learner("0.5B", PADDED, dry=dry)
    for prompt, mean, rollouts, count in TINY if dry else SHAPES:
        lengths = [(prompt, spread(mean, rollouts, group)) for group in range(count)]
        groups = make_groups(lengths, TINY_VOCABULARY if dry else VOCABULARY, device)
        name = f"{count} x ({prompt}, {mean}, {rollouts}), {kernel}"
        compare(row, name, groups, packed, padded)


def best_kernel(dry: bool) -> str:
    """Return torch's own, where it works, else the loop."""
    device, dtype = place(dry)
    try:
        check("varlen", shared_row(make_groups([(4, [3, 2])], 100, device)), device, dtype)
    except (Skip, ModuleNotFoundError):
        return "sdpa"
    return "varlen"


def spread(mean: int, count: int, seed: int) -> list[int]:
    """Return lengths with a lognormal spread of a half around the mean, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    factors = (0.5 * torch.randn(count, generator=generator) - 0.125).exp()
    return [max(1, round(mean * factor)) for factor in factors.tolist()]


def compare(
    report: Report, name: str, groups: Sequence[Group], packed: Learner, padded: Learner
) -> None:
    """Report a row for each layout; differences are to the first one's log-probabilities."""
    shared, plain, batch = shared_row(groups), plain_row(groups), Padded(groups)
    runs: dict[str, tuple[int, Learner, Logprobs]] = {
        "shared": (len(shared.tokens_N), packed, lambda: packed.logprobs(shared)),
        "packed": (len(plain.tokens_N), packed, lambda: packed.logprobs(plain)),
        "padded": (batch.tokens.numel(), padded, lambda: batch.logprobs(padded)),
    }
    expected: Tensor | None = None
    for layout, (tokens, learner, logprobs) in runs.items():
        try:
            with torch.no_grad():
                found = logprobs()
            seconds, memory = forward_and_backward(learner, logprobs)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            report(f"{name}, {layout}", memory="does not suffice")
            continue
        expected = found if expected is None else expected
        report(
            f"{name}, {layout}",
            tokens=f"{tokens:,}",
            s=f"{seconds:.3f}",
            memory=f"{memory:.1f} GiB",
            difference=f"{(found - expected).abs().max().item():.1e}",
        )


def forward_and_backward(learner: Learner, logprobs: Logprobs) -> tuple[float, float]:
    """Return seconds and GiB."""

    def run() -> None:
        logprobs().mean().backward()  # type: ignore[no-untyped-call]
        learner.model.zero_grad(set_to_none=True)

    return measure(run, warm_up=1, repeats=3)


class Padded:
    """A row for each sequence, padded on the right, where causal attention does not look."""

    def __init__(self, groups: Sequence[Group]) -> None:
        pairs = [(group.prompt, c) for group in groups for c in group.completions]
        device = pairs[0][0].device
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        self.tokens = torch.zeros(len(pairs), width, dtype=torch.long, device=device)
        sources = []
        for index, (prompt, completion) in enumerate(pairs):
            stop = len(prompt) + len(completion)
            self.tokens[index, :stop] = torch.cat([prompt, completion])
            first = index * width + len(prompt) - 1
            sources.append(torch.arange(first, first + len(completion), device=device))
        self._sources = torch.cat(sources)
        self._targets = torch.cat([completion for _, completion in pairs])

    def logprobs(self, learner: Learner) -> Tensor:
        """In the order of the packed rows."""
        hidden = learner.model.model(input_ids=self.tokens, use_cache=False).last_hidden_state
        return learner.head(hidden.flatten(0, 1)[self._sources], self._targets)
