"""A continuous batch of sequences decoded together with one key-value cache.

Shapes: B rows (rollouts in flight), V vocabulary. Rows are padded on the left, see
`actors.engines.padded_cache`.
    row 2   . . . . p p p  ◄── just prefilled, no token yet

Between two steps the batch is in one state only: ``logits_BV`` are the next-token logits of every
row *under the current weights*. A step samples from them, removes the rows that finished, feeds
the new tokens of the others, and lets waiting groups in. After a change of weights, every row is
computed anew from its token ids: no key or value of older weights survives. The prompt of a group
is computed once, in either case, and copied for its rows (`actors.engines.prefill`), unless so few
tokens are in flight that it pays to compute all of them in one pass.

Where old and new weights are in memory together, most of that is done before the change, on another
thread, while the batch goes on with the old ones (`Ahead`). What is left then are the tokens that
were sampled meanwhile.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actors.engines.engine import Request
from actors.engines.padded_cache import PaddedCache
from actors.engines.prefill import Prefill, in_parts, one_pass_will_do
from protocol.groups import Rollout
from protocol.messages import FinishReason


@dataclass(slots=True)
class _Pending:
    """A group that is waiting or being generated."""

    key: int
    request: Request
    rollouts: list[Rollout | None]


@dataclass(slots=True)
class _Row:
    """One rollout in flight."""

    group: _Pending
    index: int
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def append(self, token: int, logprob: float, version: int) -> None:
        """Add a token that was sampled under the weights of ``version``."""
        if not self.spans or self.spans[-1][1] != version:
            self.spans.append((len(self.tokens), version))
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def finish(self, reason: FinishReason) -> Rollout:
        """The rollout, ended for ``reason``."""
        return Rollout(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            spans=tuple(self.spans),
            finish=reason,
        )


class Ahead:
    """The rows in flight, computed with weights that the batch is going to have.

    Made on the engine's thread; `compute` may be called on any, while the batch goes on.
    """

    def __init__(self, model: Any, rows: Sequence[_Row]) -> None:
        self.prefill = Prefill(model.eval())
        self.rows = list(rows)
        self._known = {id(row): len(row.tokens) for row in rows}
        self._parts: list[tuple[list[_Row], PaddedCache]] = []

    @torch.inference_mode()
    def compute(self) -> None:
        """Compute the tokens that there were, but the newest of each row."""
        if self.rows:
            known = [row.tokens[: self._known[id(row)] - 1] for row in self.rows]
            self._parts = list(_computed(self.prefill, self.rows, known))

    def finish(
        self, rows: Sequence[_Row]
    ) -> Iterator[tuple[list[_Row], PaddedCache, torch.Tensor]]:
        """Compute the rest of ``rows``, which are in flight now.

        Yields rows, their cache and their next-token logits [B, V], in parts.
        """
        in_flight = {id(row) for row in rows}
        for part, cache in self._parts:
            left = [index for index, row in enumerate(part) if id(row) in in_flight]
            if left:
                chosen = [part[index] for index in left]
                cache = cache if len(left) == len(part) else cache.rows(left)
                # Each got a token at every step, so that they all lack as many.
                since = [row.tokens[self._known[id(row)] - 1 :] for row in chosen]
                yield chosen, cache, self.prefill.continued(cache, since)
        if others := [row for row in rows if id(row) not in self._known]:
            for part, cache in _computed(self.prefill, others, [r.tokens[:-1] for r in others]):
                newest = [row.tokens[-1] for row in part]
                yield part, cache, self.prefill.next_tokens(cache, newest)


class BatchGenerator:
    """Decodes up to ``max_rows`` rollouts at once; single-threaded, one `step` a token."""

    def __init__(
        self, model: Any, *, eos_ids: frozenset[int], max_rows: int, version: int = -1
    ) -> None:
        self._prefill = Prefill(model.eval())
        self._device = model.device
        self._eos_ids = eos_ids
        self._max_rows = max_rows
        self._version = version
        self._waiting: deque[_Pending] = deque()
        self._rows: list[_Row] = []
        self._cache: PaddedCache | None = None
        self._logits_BV: torch.Tensor | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being generated."""
        return bool(self._rows or self._waiting)

    def add(self, key: int, request: Request) -> None:
        """Queue a group; `step` returns it under ``key`` when all of its rollouts are done."""
        self._waiting.append(_Pending(key, request, [None] * request.num_rollouts))

    @torch.inference_mode()
    def abort(self, key: int) -> None:
        """Forget a group, waiting or not."""
        self._waiting = deque(group for group in self._waiting if group.key != key)
        gone = [index for index, row in enumerate(self._rows) if row.group.key == key]
        order = self._drop_rows(gone)
        if self._logits_BV is not None:
            self._logits_BV = self._logits_BV[torch.tensor(order)]

    def ahead(self, model: Any) -> Ahead:
        """What can be done for a change to the weights of ``model`` before it happens."""
        return Ahead(model, self._rows)

    @torch.inference_mode()
    def weights_changed(self, version: int, ahead: Ahead | None = None) -> None:
        """Recompute every row in flight under the weights that the model now holds.

        With what was computed ``ahead`` its model takes the place of the one until now.
        """
        self._version = version
        if ahead is not None:
            self._prefill = ahead.prefill
        if self._rows and ahead is not None and ahead.rows:
            self._catch_up(ahead)
        elif self._rows:
            self._recompute()

    @torch.inference_mode()
    def step(self) -> tuple[int, list[tuple[int, list[Rollout]]]]:
        """Sample one token for every row; returns their number and the groups that completed."""
        self._admit()
        num_tokens = len(self._rows)
        if num_tokens == 0:
            return 0, []
        finished = self._sample()
        if self._rows:
            self._decode()
        return num_tokens, finished

    def _admit(self) -> None:
        """Prefill waiting groups while there is room: each prompt once, then a row per rollout."""
        admitted: list[_Pending] = []
        room = self._max_rows - len(self._rows)
        while self._waiting:
            size = self._waiting[0].request.num_rollouts
            # A group larger than the whole batch still has to run: alone.
            if size > room and (self._rows or admitted):
                break
            room -= size
            admitted.append(self._waiting.popleft())
        if not admitted:
            return
        for groups in in_parts([(_prompt_length(group), group) for group in admitted]):
            logits_BV, prompts = self._prefill.prompts([g.request.prompt_tokens for g in groups])
            prompt_of_row = [i for i, g in enumerate(groups) for _ in range(g.request.num_rollouts)]
            logits_BV = logits_BV[torch.tensor(prompt_of_row, device=self._device)]
            if self._logits_BV is not None:
                logits_BV = torch.cat([self._logits_BV, logits_BV])
            self._logits_BV = logits_BV
            self._join(
                [_new_row(g, j) for g in groups for j in range(g.request.num_rollouts)],
                prompts,
                prompt_of_row,
            )

    def _recompute(self) -> None:
        """Compute every row anew: the prompts, what follows them, and all newest tokens at once."""
        if _in_one_pass(self._rows):
            sequences = [[*row.group.request.prompt_tokens, *row.tokens] for row in self._rows]
            self._logits_BV, self._cache = self._prefill.prompts(sequences)
            return
        rows, self._rows, self._cache = self._rows, [], None
        for part, cache in _in_passes(self._prefill, rows, [row.tokens[:-1] for row in rows]):
            self._join(part, cache)
        self._decode()

    def _catch_up(self, ahead: Ahead) -> None:
        """Take what was computed ahead, and compute what has come since."""
        rows, self._rows, self._cache = self._rows, [], None
        logits = []
        for part, cache, logits_BV in ahead.finish(rows):
            self._join(part, cache)
            logits.append(logits_BV)
        self._logits_BV = torch.cat(logits)

    def _join(
        self, rows: list[_Row], cache: PaddedCache, indices: Sequence[int] | None = None
    ) -> None:
        """Append rows to the batch, each with a copy of a row of ``cache``.

        Without indices each has its own there, and the caller gives the cache away.
        """
        self._rows += rows
        if self._cache is not None:
            self._cache.append(cache, range(len(rows)) if indices is None else indices)
        else:
            self._cache = cache if indices is None else cache.rows(indices)

    def _sample(self) -> list[tuple[int, list[Rollout]]]:
        """Draw a token for every row; drop the rows that are done."""
        assert self._logits_BV is not None
        temperatures = [row.group.request.temperature for row in self._rows]
        uniforms = [row.uniforms[len(row.tokens)] for row in self._rows]
        tokens_B, logprobs_B = sample_tokens(
            self._logits_BV,
            torch.tensor(temperatures, device=self._logits_BV.device),
            torch.tensor(np.array(uniforms), device=self._logits_BV.device),
        )
        gone: list[int] = []
        finished: list[tuple[int, list[Rollout]]] = []
        for index, (row, token, logprob) in enumerate(
            zip(self._rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        ):
            row.append(token, logprob, self._version)
            if token in self._eos_ids:
                finished += _complete(row, "stop")
            elif len(row.tokens) == row.group.request.max_tokens:
                finished += _complete(row, "length")
            else:
                continue
            gone.append(index)
        self._drop_rows(gone)
        return finished

    def _drop_rows(self, gone: list[int]) -> list[int]:
        """Forget rows; returns which row each of those left has been before."""
        if len(gone) == len(self._rows):
            self._rows, self._cache, self._logits_BV = [], None, None
            return []
        if not gone:
            return list(range(len(self._rows)))
        assert self._cache is not None
        order = self._cache.drop(gone)
        self._rows = [self._rows[index] for index in order]
        return order

    def _decode(self) -> None:
        """Feed the newest token of every row, which gives the logits of the next one."""
        assert self._cache is not None
        tokens = [row.tokens[-1] for row in self._rows]
        self._logits_BV = self._prefill.next_tokens(self._cache, tokens)


def sample_tokens(
    logits_BV: torch.Tensor, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row: tokens [B] and their log-probabilities [B].

    Each row's distribution is inverted at the row's own uniform draw, which makes a rollout
    independent of the batch that it happens to be in. The cumulative sum is in float64: in float32
    it would misplace tokens of a large vocabulary.
    Temperature 0 takes the most likely token and gives its log-probability at temperature 1.
    """
    greedy_B = temperatures_B == 0
    logits_BV = logits_BV / torch.where(greedy_B, 1.0, temperatures_B)[:, None]
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    targets_B1 = uniforms_B.double()[:, None] * cumulative_BV[:, -1:]
    sampled_B = torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0]
    # Rounding may put the target on the very end of the last token's interval.
    sampled_B = sampled_B.clamp(max=logits_BV.shape[1] - 1)
    tokens_B = torch.where(greedy_B, logits_BV.argmax(-1), sampled_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def _new_row(group: _Pending, index: int) -> _Row:
    # Philox takes the pair as its key, so streams of neighbouring seeds do not overlap.
    random = np.random.Generator(np.random.Philox(key=[group.request.seed, index]))
    return _Row(group, index, random.random(group.request.max_tokens))


def _in_one_pass(rows: Sequence[_Row]) -> bool:
    prompts = {row.group.key: row.group.request.prompt_tokens for row in rows}
    return one_pass_will_do(
        [[*row.group.request.prompt_tokens, *row.tokens] for row in rows],
        list(prompts.values()),
        [row.tokens for row in rows],
    )


def _computed(
    prefill: Prefill, rows: Sequence[_Row], completions: Sequence[Sequence[int]]
) -> Iterator[tuple[list[_Row], PaddedCache]]:
    """Rows and their cache, in parts of bounded size: of each its prompt and its completion here.

    Not `_Row.tokens`, to which a batch may add meanwhile.
    """
    if _in_one_pass(rows):
        pairs = zip(rows, completions, strict=True)
        whole = [[*row.group.request.prompt_tokens, *tokens] for row, tokens in pairs]
        yield list(rows), prefill.prompts(whole)[1]
    else:
        yield from _in_passes(prefill, rows, completions)


def _in_passes(
    prefill: Prefill, rows: Sequence[_Row], completions: Sequence[Sequence[int]]
) -> Iterator[tuple[list[_Row], PaddedCache]]:
    """As `_computed`, each prompt once for its group."""
    groups = {row.group.key: row.group for row in rows}
    of_group: dict[int, list[tuple[_Row, Sequence[int]]]] = defaultdict(list)
    for row, tokens in zip(rows, completions, strict=True):
        of_group[row.group.key].append((row, tokens))
    for part in in_parts([(_prompt_length(group), group) for group in groups.values()]):
        _, prompts = prefill.prompts([group.request.prompt_tokens for group in part])
        waiting = [
            (_prompt_length(group) + len(tokens), (index, row, tokens))
            for index, group in enumerate(part)
            for row, tokens in of_group[group.key]
        ]
        for chosen in in_parts(waiting):
            cache = prompts.rows([index for index, _, _ in chosen])
            prefill.completions(cache, [tokens for _, _, tokens in chosen])
            yield [row for _, row, _ in chosen], cache


def _complete(row: _Row, reason: FinishReason) -> list[tuple[int, list[Rollout]]]:
    group = row.group
    group.rollouts[row.index] = row.finish(reason)
    done = [rollout for rollout in group.rollouts if rollout is not None]
    return [(group.key, done)] if len(done) == len(group.rollouts) else []


def _prompt_length(group: _Pending) -> int:
    return len(group.request.prompt_tokens)
