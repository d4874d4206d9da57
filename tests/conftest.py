"""What all tests share: the small policy that the project ships, and one CPU thread each."""

import signal
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell ignores it for what it starts in the background, and so would every process of a test.
    signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """The warm-started policy of `tool_calling_tiny`: config, weights, tokenizer."""
    return EXAMPLES / "tool_calling_tiny" / "base"


@pytest.fixture(scope="session")
def recipe() -> Path:
    return EXAMPLES / "tool_calling_tiny.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "the tests in tests/chaos")
    group.addoption(
        "--chaos-minutes", type=float, default=5.0, help="with a learner that is too slow"
    )
    group.addoption("--chaos-seed", type=int, help="repeat the random run of this seed")
    group.addoption("--chaos-random-s", type=float, default=150.0, help="of the random run")
    group.addoption(
        "--chaos-results", default="runs/chaos.jsonl", help="figures, a line of JSON per test"
    )
    parser.addoption(
        "--fuzz-frames", type=int, default=100_000, help="mutants that test_fuzz.py sends"
    )
    parser.addoption(
        "--fuzz-seed", default="1", help="of the mutants: a number, or random; it is printed"
    )
