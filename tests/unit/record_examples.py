"""A step and a summary, as a learner writes them into its run folder."""

from typing import Any

from learner.records import EvaluationResult, Step, Summary

STEP: dict[str, Any] = {
    "step": 1,
    "seconds": 1.5,
    "step_seconds": 0.5,
    "rewards": {"format": 0.5},
    "reward_settings": {
        "format": {"weight": 1.0, "when": None},
        "correctness": {"weight": 0.5, "when": {"reward": "format", "at_least": 1.0}},
    },
    "staleness_mean": 0.5,
    "staleness_max": 1,
    "groups_refilled": 2,
    "tokens_generated_per_s": 100.0,
    "tokens_trained_per_s": 50.0,
    "actor_idle_share": 0.0,
    "learner_wait_share": 0.25,
    "buffer_groups": 3,
    "buffer_bytes": 1234,
    "actors_live": 1,
    "lag0_logprob_difference": None,
    "actor_difference_mean": 1e-6,
    "actor_difference_largest": None,
    "loss": 0.125,
    "ess": 0.5,
}

HELDOUT: dict[str, Any] = {
    "prompts": 8,
    "failed_prompts": 0,
    "missing_prompts": 0,
    "num_rollouts": 4,
    "temperature": 1.0,
    "completion_tokens_mean": 9.0,
    "truncated_share": 0.125,
    "means": {"a": 0.25, "b": None},
    "pass_at": {"1": 0.25, "4": 0.5},
}
BEFORE: dict[str, Any] = {"due": 0, "version": 0, "seconds": 1.5, "sets": {"heldout": HELDOUT}}
AFTER: dict[str, Any] = {
    "due": 10,
    "version": 10,
    "seconds": 1.25,
    "sets": {
        "heldout": HELDOUT
        | {
            "completion_tokens_mean": 8.5,
            "means": {"a": 0.75, "b": 1.0},
            "pass_at": {"1": 0.5, "4": 0.75},
        }
    },
}

SUMMARY: dict[str, Any] = {
    "run": "tiny",
    "completed": True,
    "ended_because": "all steps done",
    "steps": 10,
    "seconds_training": 12.3,
    "rewards": {
        "changes": [
            {
                "from_step": 3,
                "source": "command",
                "rewards": {"a": {"weight": 0.5, "when": {"reward": "b", "at_least": 1.0}}},
            }
        ],
        "failures": {},
    },
    "evaluations": [BEFORE, AFTER],
    "books": {
        "leases": {
            "train": {
                "leased": 9,
                "received": 7,
                "failed": {"actor_lost": 2},
                "outstanding": 0,
                "balanced": True,
            }
        },
        "groups": {
            "accepted": 7,
            "trained": 4,
            "evicted": {},
            "evicted_tokens": {},
            "buffered": 2,
            "balanced": False,
        },
    },
    "throughput": {"tokens_trained": 15184, "tokens_trained_per_s": 1234.5, "tokens_generated": 9},
    "staleness": {"largest": 2, "limit": 2},
    "lag0_logprob_difference": 1.23e-6,
    "phase_seconds": {"generate": 0.5},
    "actors_lost": 1,
    "bad_messages": 0,
    "connections_refused": {},
    "messages_refused": {"unknown key": 2},
    "weights": {
        "version": 10,
        "digest_mismatches": 0,
        "actors_stalled_share": 0.01,
        "pushes": 10,
        "evictions": {"late": 1},
        "stream_share": 0.003,
    },
    "checkpoint": "runs/tiny/checkpoint",
}


def make_step(step: int = 1, **changes: Any) -> Step:
    """The line of a step."""
    return Step.model_validate(STEP | {"step": step} | changes)


def make_summary(**changes: Any) -> Summary:
    """The summary of a run that completed ten steps."""
    return Summary.model_validate(SUMMARY | changes)


def make_evaluation(**changes: Any) -> EvaluationResult:
    """The evaluation before training."""
    return EvaluationResult.model_validate(BEFORE | changes)
