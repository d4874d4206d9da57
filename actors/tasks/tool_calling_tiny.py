"""Tool calling in miniature: a language of 55 tokens.

A policy of 283 thousand parameters can learn the two ToolRL rewards of `actors.tasks.tool_calling`
in it, on one CPU core.

A prompt asks for one or two calls, an answer makes them:

    weather paris monday ; stock acme friday =>

    <think>two</think><tool_call>{"name":"weather","parameters":{"city":"paris","day":"monday"}}
    {"name":"stock","parameters":{"ticker":"acme","day":"friday"}}</tool_call><eos>

The thought is the number of calls. Each bracketed tag, each piece of JSON between two words
(`{"name":"`, `","parameters":{`, `"city":"`, `",`, `"}}`, the line break) and each word is one
token, so that an answer has 15 or 25 of them, and a prompt shares its words with its answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOOLS = {
    "weather": ("city", "day"),
    "stock": ("ticker", "day"),
    "convert": ("amount", "unit"),
    "remind": ("task", "day"),
    "route": ("city", "mode"),
}
VALUES = {
    "city": ("paris", "tokyo", "cairo", "lima"),
    "day": ("monday", "tuesday", "friday", "sunday"),
    "ticker": ("acme", "globex", "initech", "hooli"),
    "amount": ("ten", "twenty", "fifty", "hundred"),
    "unit": ("euro", "dollar", "mile", "gram"),
    "task": ("shop", "call", "swim", "read"),
    "mode": ("bus", "train", "bike", "foot"),
}
THOUGHTS = {1: "one", 2: "two"}
PAD, EOS = "<pad>", "<eos>"
MAX_ANSWER_TOKENS = 25


@dataclass(frozen=True)
class ToolCall:
    """A tool and a value for each of its parameters, in the order of `TOOLS`."""

    tool: str
    values: tuple[str, ...]


Request = tuple[ToolCall, ...]
"""The one or two calls that a prompt asks for."""


@dataclass(frozen=True)
class Noise:
    """How often a demonstration goes wrong: what is left for reinforcement learning to repair."""

    broken_frame: float = 0.965
    """Share of answers whose think section is missing (two thirds of them), misplaced, unclosed or
    unopened."""
    unclosed_calls: float = 0.06
    """Share of answers that end before `</tool_call>`."""
    wrong_number: float = 0.08
    """Share of answers with a call too few, or one too many."""
    wrong_tool: float = 0.08
    """Share of calls replaced by a call of another tool."""
    wrong_value: float = 0.2
    """Share of values replaced by another value of the parameter."""


def vocabulary() -> list[str]:
    """Every token of the language, in the order of its id."""
    keys = [f'"{key}":"' for key in VALUES]
    json_pieces = ['{"name":"', '","parameters":{', *keys, '",', '"}}', "\n"]
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    words = [*TOOLS, *(value for values in VALUES.values() for value in values)]
    return [PAD, EOS, *tags, *json_pieces, ";", "=>", *THOUGHTS.values(), *words]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the language; blanks and unknown text give no token.

    All tokens are "added" tokens over a model without merges, and only padding and end are
    special. transformers loads the tokenizer of any `qwen2` folder as a Qwen2Tokenizer, which
    puts its own pre-tokenizer, model and decoder in place of the file's: added tokens survive
    that, a WordLevel model would not.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = vocabulary()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.Fuse()
    special = [PAD, EOS]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    plain = [token for token in tokens if token not in special]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=PAD,
        padding_side="left",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )


def split_requests(seed: int, heldout_share: float = 0.2) -> tuple[list[Request], list[Request]]:
    """Every request of the language, shuffled and parted into training and held-out requests.

    Both parts hold their share of the 80 single calls and of the 6320 pairs of different calls,
    single calls first.
    """
    rng = random.Random(seed)
    calls = [
        ToolCall(tool, values)
        for tool, keys in TOOLS.items()
        for values in product(*(VALUES[key] for key in keys))
    ]
    train: list[Request] = []
    heldout: list[Request] = []
    for requests in ([(call,) for call in calls], list(permutations(calls, 2))):
        rng.shuffle(requests)
        cut = round(len(requests) * heldout_share)
        heldout += requests[:cut]
        train += requests[cut:]
    return train, heldout


def make_rows(requests: list[Request], num_rows: int, seed: int) -> list[dict[str, str]]:
    """Rows with the columns `prompt` and `ground_truth`: a quarter single calls, the rest pairs.

    No pair comes twice; single calls do, because there are only 80.
    """
    rng = random.Random(seed)
    singles = [request for request in requests if len(request) == 1]
    pairs = [request for request in requests if len(request) == 2]
    num_singles = num_rows // 4
    chosen: list[Request] = [singles[i % len(singles)] for i in range(num_singles)]
    chosen += rng.sample(pairs, k=num_rows - num_singles)
    rng.shuffle(chosen)
    return [{"prompt": prompt_of(r), "ground_truth": ground_truth_of(r)} for r in chosen]


def prompt_of(request: Request) -> str:
    """The prompt for a request, such as `weather paris monday ; stock acme friday =>`."""
    return " ; ".join(" ".join((call.tool, *call.values)) for call in request) + " =>"


def ground_truth_of(request: Request) -> str:
    """The calls in ToolRL's frame, a JSON object a line, as the rewards expect it."""
    lines = [
        json.dumps({"name": c.tool, "parameters": dict(zip(TOOLS[c.tool], c.values, strict=True))})
        for c in request
    ]
    return "\n".join(["<tool_call>", *lines, "</tool_call>"])


def clean_answer(request: Request) -> str:
    """The answer that earns both rewards in full."""
    return _think(request) + _tool_call(request)


def noisy_answer(request: Request, noise: Noise, rng: random.Random) -> str:
    """A demonstration with the mistakes that ``noise`` asks for."""
    made = _mistaken(request, noise, rng)
    section = _tool_call(made)
    if rng.random() < noise.unclosed_calls:
        section = section.removesuffix("</tool_call>")
    if rng.random() >= noise.broken_frame:
        return _think(request) + section
    thought = THOUGHTS[len(request)]
    broken_frames = [
        *[section] * 6,
        section + _think(request),
        f"<think>{thought}{section}",
        f"{thought}</think>{section}",
    ]
    return rng.choice(broken_frames)


def _think(request: Request) -> str:
    return f"<think>{THOUGHTS[len(request)]}</think>"


def _tool_call(calls: Iterable[ToolCall]) -> str:
    return "<tool_call>" + "\n".join(_call_text(call) for call in calls) + "</tool_call>"


def _call_text(call: ToolCall) -> str:
    pairs = zip(TOOLS[call.tool], call.values, strict=True)
    parameters = ",".join(f'"{key}":"{value}"' for key, value in pairs)
    return f'{{"name":"{call.tool}","parameters":{{{parameters}}}}}'


def _mistaken(request: Request, noise: Noise, rng: random.Random) -> list[ToolCall]:
    made = [_mistaken_call(call, noise, rng) for call in request]
    if rng.random() >= noise.wrong_number:
        return made
    return made[:1] if len(made) == 2 else [*made, _random_call(rng.choice(list(TOOLS)), rng)]


def _mistaken_call(call: ToolCall, noise: Noise, rng: random.Random) -> ToolCall:
    if rng.random() < noise.wrong_tool:
        return _random_call(rng.choice([tool for tool in TOOLS if tool != call.tool]), rng)
    pairs = zip(TOOLS[call.tool], call.values, strict=True)
    return ToolCall(call.tool, tuple(_mistaken_value(k, v, noise, rng) for k, v in pairs))


def _mistaken_value(key: str, value: str, noise: Noise, rng: random.Random) -> str:
    if rng.random() >= noise.wrong_value:
        return value
    return rng.choice([other for other in VALUES[key] if other != value])


def _random_call(tool: str, rng: random.Random) -> ToolCall:
    return ToolCall(tool, tuple(rng.choice(VALUES[key]) for key in TOOLS[tool]))
