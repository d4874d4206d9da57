"""Peak memory of the loss, forward and backward, beyond the logits and in their size.

    python -m benchmarks.loss_memory [--sequences 8] [--tokens 256] [--vocabulary 32000]

Each case runs in a process of its own: the peak of a process never goes down again. 1.0 is the
gradient of the logits, which nothing can do without; the rest is what the loss costs.
"""

import argparse
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gdpo

Shape = tuple[int, int, int]


def loss(logprobs: Tensor, entropy: gdpo.EntropyTerm | None = None) -> Tensor:
    """The loss of a minibatch one update off policy."""
    old = (logprobs + 0.01).detach()
    advantages = torch.linspace(-1, 1, len(logprobs))
    return gdpo.policy_loss(
        logprobs,
        advantages,
        torch.ones_like(logprobs),
        behaviour_logprobs=old,
        proximal_logprobs=old,
        entropy=entropy,
    ).loss


def forward_only(logits: Tensor, tokens: Tensor) -> None:
    gdpo.token_logprobs(logits.detach(), tokens)


def chunked(logits: Tensor, tokens: Tensor) -> None:
    loss(gdpo.token_logprobs(logits, tokens)).backward()  # type: ignore[no-untyped-call]


def with_entropy(logits: Tensor, tokens: Tensor) -> None:
    logprobs, entropy = gdpo.token_logprobs_and_entropy(logits, tokens)
    loss(logprobs, gdpo.EntropyTerm(entropy, 0.01)).backward()  # type: ignore[no-untyped-call]


def dense(logits: Tensor, tokens: Tensor) -> None:
    logprobs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    loss(logprobs).backward()  # type: ignore[no-untyped-call]


CASES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "token_logprobs, forward only": forward_only,
    "token_logprobs + policy_loss": chunked,
    "the same with an entropy bonus": with_entropy,
    "log_softmax of everything + policy_loss": dense,
}


def measure(name: str, shape: Shape, answer: Connection) -> None:
    """Send the bytes that the case needed beyond its logits."""
    torch.set_num_threads(1)
    # First on something small, so that libraries are loaded before the measurement.
    CASES[name](torch.randn(2, 3, 8, requires_grad=True), torch.zeros(2, 3, dtype=torch.long))
    logits = torch.empty(shape).normal_().requires_grad_()
    tokens = torch.zeros(shape[:2], dtype=torch.long)
    before = peak_bytes()
    CASES[name](logits, tokens)
    answer.send(peak_bytes() - before)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(name: str, shape: Shape) -> int:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, shape, there))
    process.start()
    there.close()
    extra: int = here.recv()
    process.join()
    return extra


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    given = parser.parse_args()
    shape = (given.sequences, given.tokens, given.vocabulary)
    size = 4 * given.sequences * given.tokens * given.vocabulary

    table = Table(title=f"Peak beyond logits {list(shape)} of {size / 2**20:.0f} MiB")
    table.add_column("case")
    table.add_column("MiB", justify="right")
    table.add_column("x logits", justify="right")
    for name in CASES:
        extra = peak_of(name, shape)
        table.add_row(name, f"{extra / 2**20:.0f}", f"{extra / size:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
