"""Rollouts of one turn: a prompt, its completions, their scores."""

import time
from typing import Any

import numpy as np

from actors.engines.engine import Engine, Request, UnusableRow
from actors.rewards.scorer import RewardScorer, Scored
from protocol.errors import brief
from protocol.groups import Group
from protocol.messages import Lease


class RolloutWorker:
    """Encodes a prompt, has it completed, decodes and scores the completions."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        scorer: RewardScorer,
        *,
        max_prompt_tokens: int,
        max_tokens: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._max_prompt_tokens = max_prompt_tokens
        self._max_tokens = max_tokens

    async def roll_out(self, lease: Lease) -> Group:
        """Turn a lease into a group; raises `UnusableRow`, `RewardFailure` or `EngineError`."""
        if lease.max_tokens > self._max_tokens:
            # Engines set memory aside for the longest completion.
            raise UnusableRow(
                f"the lease is for {lease.max_tokens} tokens; sampling.max_tokens is "
                f"{self._max_tokens}"
            )
        prompt_tokens = self._encode(lease.row.get("prompt"))
        started = time.monotonic()
        rollouts = await self._engine.generate(
            Request(
                prompt_tokens=prompt_tokens,
                num_rollouts=lease.num_rollouts,
                temperature=lease.temperature,
                max_tokens=lease.max_tokens,
                seed=lease.seed,
            )
        )
        generated = time.monotonic()
        ids = [rollout.tokens.tolist() for rollout in rollouts]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        if lease.purpose == "check":
            # Only the log-probabilities are looked at.
            shape = (len(ids), len(self._scorer.names))
            scored = Scored(np.full(shape, np.nan, dtype=np.float32), {})
        else:
            finish = [rollout.finish for rollout in rollouts]
            scored = await self._scorer.score(lease.prompt_id, lease.row, texts, ids, finish)
        return Group(
            lease=lease.lease,
            prompt_tokens=np.array(prompt_tokens, dtype=np.int32),
            rollouts=tuple(rollouts),
            reward_names=self._scorer.names,
            scores=scored.scores,
            generation_seconds=generated - started,
            reward_seconds=time.monotonic() - generated,
            missing=scored.missing,
        )

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        """Token ids of a prompt: plain text, or chat messages through the chat template."""
        try:
            if isinstance(prompt, str):
                ids = self._tokenizer(prompt)["input_ids"]
            else:
                # Lists of lists would be taken for several conversations.
                if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
                    raise ValueError("it is neither text nor a list of chat messages")
                ids = self._tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=False
                )
        except Exception as error:
            # Tokenizers and templates raise what they like; the row is at fault, not the actor.
            raise UnusableRow(f"the prompt cannot be tokenized: {brief(error)}") from error
        if not ids:
            raise UnusableRow("the prompt has no tokens: the tokenizer knows none of its words")
        if len(ids) > self._max_prompt_tokens:
            raise UnusableRow(
                f"the prompt has {len(ids)} tokens; sampling.max_prompt_tokens is "
                f"{self._max_prompt_tokens}"
            )
        return tuple(ids)
