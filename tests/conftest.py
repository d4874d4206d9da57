"""What all tests share: the small policy that the project ships, and one CPU thread each."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """The warm-started policy of `tool_calling_tiny`: config, weights, tokenizer."""
    return EXAMPLES / "tool_calling_tiny" / "base"


@pytest.fixture(scope="session")
def recipe() -> Path:
    return EXAMPLES / "tool_calling_tiny.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-frames", type=int, default=100_000, help="mutants that test_fuzz.py sends"
    )
    parser.addoption(
        "--fuzz-seed", default="1", help="of the mutants: a number, or random; it is printed"
    )
