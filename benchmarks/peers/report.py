"""The table at the end."""

from collections.abc import Sequence

from rich.table import Table

from benchmarks.peers.cases import Case
from benchmarks.peers.result import Result

COLUMNS = (
    *("model", "system", "batches", "samples/s", "ratio", "warm", "ratio", "s a batch"),
    *("tokens a sample", "where the time went", "peak memory, MB"),
)
LEFT = ("model", "system", "where the time went", "peak memory, MB")


def make_table(results: Sequence[tuple[Case, Sequence[Result]]]) -> Table:
    """Draw a row for each case and system; ratios are to the first system of the case.

    "Warm" is after the first quarter of the batches.
    """
    table = Table(title="samples generated, scored and trained on in a second", show_lines=True)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in LEFT else "right")
    for case, of_case in results:
        for result in of_case:
            table.add_row(*row(case, result, of_case[0]))
    return table


def row(case: Case, result: Result, base: Result) -> tuple[str, ...]:
    """Return the cells of one result."""
    memory = memory_text(result.peak_bytes)
    name = f"{case.name}, {case.dtype}"
    if not result.ends:
        return (name, result.system, "0", *["-"] * 6, result.note, memory)
    rate, warm = result.samples_per_s, result.later_samples_per_s
    return (
        name,
        result.system,
        f"{len(result.ends)} of {case.batches}",
        f"{rate:.2f}",
        f"{rate / base.samples_per_s:.2f}" if base.ends else "-",
        f"{warm:.2f}",
        f"{warm / base.later_samples_per_s:.2f}" if base.ends else "-",
        f"{result.batch_seconds:.2f}",
        f"{result.tokens_per_sample:.1f}",
        "\n".join(
            [
                *(f"{share:4.0%} {part}" for part, share in result.split.items()),
                *([f"({result.note})"] if result.note else []),
            ]
        ),
        memory,
    )


def memory_text(peaks: dict[str, list[int]]) -> str:
    """Return a line for each role: the sizes of its processes, or how many there are of many."""
    lines = []
    for role, sizes in peaks.items():
        millions = [f"{size / 1e6:,.0f}" for size in sizes]
        many = len(sizes) > 3
        text = f"{len(sizes)} of up to {millions[0]}" if many else " + ".join(millions)
        lines.append(f"{role} {text}")
    return "\n".join(lines)
