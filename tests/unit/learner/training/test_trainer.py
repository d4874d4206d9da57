"""The trainer on the shipped policy, fed with groups that the real sampling loop made."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gdpo
from actors.engines.batch_generator import BatchGenerator
from actors.engines.engine import Request
from learner.config.file import load_config
from learner.config.run import RunConfig
from learner.packing.choice import choose
from learner.packing.forward import Forward
from learner.packing.rows import packed_row
from learner.packing.trees import tree_of
from learner.training.policy import load_policy
from learner.training.reward_settings import RewardSetting
from learner.training.trainer import StepResult, Trainer, lr_factor
from protocol.errors import TrainingError
from protocol.groups import Group
from tests.unit.factories import pack_alone

NUM_PROMPTS, NUM_ROLLOUTS = 6, 4


@pytest.fixture
def config(recipe: Path) -> RunConfig:
    return load_config(recipe, [f"training.batch_groups={NUM_PROMPTS}", "training.minibatches=2"])


def make_groups(config: RunConfig, version: int = 0, seed: int = 0) -> list[Group]:
    """Groups sampled from the base policy with random scores."""
    generator = BatchGenerator(
        load_policy(config).model, eos_ids=frozenset([1]), max_rows=64, version=version
    )
    for key in range(NUM_PROMPTS):
        prompt = tuple(range(10, 14 + key))
        generator.add(key, Request(prompt, NUM_ROLLOUTS, 1.0, 16, seed + key))
    random = np.random.default_rng(seed)
    groups = []
    while generator.busy:
        for key, rollouts in generator.step()[1]:
            groups.append(
                Group(
                    lease=key,
                    prompt_tokens=np.arange(10, 14 + key, dtype=np.int32),
                    rollouts=tuple(rollouts),
                    reward_names=("format", "correctness"),
                    scores=random.random((NUM_ROLLOUTS, 2)).astype(np.float32),
                )
            )
    return sorted(groups, key=lambda g: g.lease)


def with_algorithm(config: RunConfig, **changes) -> RunConfig:
    return config.model_copy(update={"algorithm": config.algorithm.model_copy(update=changes)})


def setting(config: RunConfig, **weights: float) -> RewardSetting:
    """What the rewards count: as the configuration says, but for these."""
    chosen = {r.name: weights.get(r.name, r.weight) for r in config.rewards}
    return RewardSetting(chosen, {r.name: r.when for r in config.rewards})


def train(trainer: Trainer, groups: list[Group], **weights: float) -> StepResult:
    return trainer.step(groups, setting(trainer._config, **weights))


def train_once(config: RunConfig, **algorithm) -> StepResult:
    changed = with_algorithm(config, **algorithm)
    return train(Trainer(load_policy(changed), changed), make_groups(changed))


def test_the_samplers_log_probabilities_equal_the_trainers_at_lag_0(config):
    result = train(Trainer(load_policy(config), config), make_groups(config))
    print(f"largest difference: {result.lag0_difference:.2e}")
    assert result.lag0_difference is not None
    assert result.lag0_difference < 1e-4
    assert result.metrics["ess"] == pytest.approx(1.0, abs=1e-4)


def test_stale_tokens_do_not_count_as_lag_0(config):
    trainer = Trainer(load_policy(config), config)
    trainer.version = 3
    result = train(trainer, make_groups(config, version=1))
    assert result.lag0_difference is None
    assert result.staleness == [2] * NUM_PROMPTS
    assert result.version == 4


def test_microbatches_do_not_change_the_step(config):
    groups = make_groups(config)
    weights = []
    metrics = []
    for size in (4096, 40, 1):
        policy = load_policy(config)
        changed = config.model_copy(
            update={"training": config.training.model_copy(update={"microbatch_tokens": size})}
        )
        metrics.append(train(Trainer(policy, changed), groups).metrics)
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    for other, weight in zip(metrics[1:], weights[1:], strict=True):
        assert other == pytest.approx(metrics[0], rel=1e-4, abs=1e-6)
        # AdamW's first steps are lr * sign(gradient): only gradients near 0 may differ, by 2 lr
        # in each of the two minibatches.
        assert (weight - weights[0]).abs().max() <= 4 * config.optimizer.lr
        assert (weight - weights[0]).abs().mean() < 1e-2 * config.optimizer.lr


def test_checkpointed_layers_do_not_change_the_step(config):
    groups = make_groups(config)
    weights = []
    for checkpointed in (False, True):
        policy = load_policy(config)
        training = {"activation_checkpointing": checkpointed, "microbatch_tokens": 4096}
        changed = config.model_copy(
            update={"training": config.training.model_copy(update=training)}
        )
        train(Trainer(policy, changed), groups)
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("master_weights", [True, False])
def test_a_bfloat16_model_moves_by_its_masters_alone(config, master_weights):
    """Above 0.01 its steps are 6e-5 or more: an update of 1e-6 alone rounds to none."""
    model = config.model.model_copy(update={"dtype": "bfloat16"})
    optimizer = config.optimizer.model_copy(update={"lr": 1e-6, "master_weights": master_weights})
    changed = config.model_copy(update={"model": model, "optimizer": optimizer})
    policy = load_policy(changed)
    before = [p.detach().clone() for p in policy.model.parameters()]
    result = train(Trainer(policy, changed), make_groups(config))
    large = [p.abs() > 1e-2 for p in before]
    moved = sum(
        int((p != b)[where].sum())
        for p, b, where in zip(policy.model.parameters(), before, large, strict=True)
    )
    assert math.isfinite(result.metrics["grad_norm"])
    assert (moved > 0) == master_weights


def test_a_step_makes_better_rollouts_more_likely(config):
    groups = make_groups(config)
    policy = load_policy(config)
    trainer = Trainer(policy, config)
    trees = [tree_of(group, i * NUM_ROLLOUTS) for i, group in enumerate(groups)]
    rows = packed_row(trees, torch.device("cpu"))
    forward = Forward(choose(policy.model, 64), config.sampling.temperature)
    with torch.no_grad():
        before = forward.logprobs(policy.model, rows)
        for _ in range(3):
            with torch.enable_grad():
                train(trainer, groups)
        after = forward.logprobs(policy.model, rows)
    change = torch.zeros(NUM_PROMPTS * NUM_ROLLOUTS)
    change.index_add_(0, rows.sequence_N, after - before)
    totals = torch.tensor(np.stack([g.scores.sum(1) for g in groups]))
    best = totals.argmax(1) + torch.arange(NUM_PROMPTS) * NUM_ROLLOUTS
    worst = totals.argmin(1) + torch.arange(NUM_PROMPTS) * NUM_ROLLOUTS
    assert change[best].mean() > change[worst].mean()


def test_a_weight_that_changes_between_steps_changes_what_the_same_groups_teach(config):
    groups = make_groups(config)
    trainer = Trainer(load_policy(config), config)
    first = train(trainer, groups)
    second = train(trainer, groups, format=0.0)
    assert first.setting.weights["format"] == 1.0
    assert second.setting.weights["format"] == 0.0
    assert first.metrics["reward/format/advantage_share"] > 0.2
    assert second.metrics["reward/format/advantage_share"] == 0.0


def test_groups_without_any_difference_leave_the_weights_alone(config):
    policy = load_policy(config)
    before = pack_alone(0, policy.model, policy.specs).digest
    groups = make_groups(config)
    for group in groups:
        group.scores[:] = 1.0
    result = train(Trainer(policy, config), groups)
    assert pack_alone(1, policy.model, policy.specs).digest == before
    assert result.metrics["groups/dead"] == NUM_PROMPTS


@pytest.mark.parametrize("estimator", gdpo.ESTIMATORS)
def test_every_estimator_trains(config, estimator):
    result = train_once(config, estimator=estimator)
    assert math.isfinite(result.metrics["loss"])
    assert result.metrics["grad_norm"] > 0


@pytest.mark.parametrize("correction", gdpo.CORRECTIONS)
def test_every_correction_trains(config, correction):
    result = train_once(config, correction=correction)
    assert math.isfinite(result.metrics["loss"])
    assert result.metrics["grad_norm"] > 0
    assert result.lag0_difference is not None
    assert result.lag0_difference < 1e-4
    # All tokens are of the trainer's version.
    assert result.metrics["staleness/0/ess"] == pytest.approx(1.0, abs=0.05)


def test_the_limits_of_a_correction_are_its_own_unless_set(config):
    """gspo clips at 3e-4: 0.2 would clip nothing."""
    own = train_once(config, correction="gspo").metrics
    wide = train_once(config, correction="gspo", clip_low=0.2, clip_high=0.2).metrics
    clipped = own["clip_low_share"] + own["clip_high_share"]
    assert clipped > wide["clip_low_share"] + wide["clip_high_share"]


def test_an_interpolated_proximal_policy_saves_a_pass_and_stays_near(config):
    recomputed = train_once(config)
    interpolated = train_once(config, proximal="interpolated")
    # At lag 0 both are mu: w = 1.
    assert interpolated.metrics["weight_mean"] == pytest.approx(1.0, abs=1e-4)
    assert interpolated.metrics["loss"] == pytest.approx(recomputed.metrics["loss"], abs=0.05)


def test_the_divergence_from_the_first_model_is_measured_and_held_down(config):
    policy = load_policy(config)
    changed = with_algorithm(config, kl_coefficient=0.1)
    trainer = Trainer(policy, changed)
    groups = make_groups(config)
    first, second = train(trainer, groups), train(trainer, groups)
    assert 0 <= first.metrics["reference_kl"] < second.metrics["reference_kl"]


def test_an_entropy_bonus_changes_the_gradient(config):
    plain = train_once(config)
    bonus = train_once(config, entropy_coefficient=1.0)
    assert bonus.metrics["entropy"] > 0
    assert bonus.metrics["grad_norm"] != plain.metrics["grad_norm"]


def test_a_small_effective_sample_makes_a_small_step(config):
    """Behaviour log-probabilities off by up to 6 give weights of very different size."""
    moved = []
    for scale in (False, True):
        groups = make_groups(config)
        for group in groups:
            for rollout in group.rollouts:
                rollout.logprobs[::3] -= 6.0
        policy = load_policy(config)
        before = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
        result = train(Trainer(policy, with_algorithm(config, scale_lr_by_ess=scale)), groups)
        after = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
        moved.append((after - before).abs().mean().item())
        assert result.metrics["ess"] < 0.5
    assert moved[1] < 0.75 * moved[0]


def test_the_batch_std_can_be_smoothed_over_batches(config):
    groups = make_groups(config)
    for group in groups[1:]:
        group.scores[:] = 1.0
    trainer = Trainer(load_policy(config), with_algorithm(config, batch_std_ema=0.5))
    train(trainer, make_groups(config))
    first = trainer.batch_std
    train(trainer, groups)
    # Five dead groups of six shrink the batch's own std; half of it is the one before.
    assert first is not None
    assert trainer.batch_std is not None
    assert first / 2 < trainer.batch_std < first


def test_other_weights_begin_the_smoothed_batch_std_anew(config):
    groups = make_groups(config)
    trainer = Trainer(load_policy(config), with_algorithm(config, batch_std_ema=0.9))
    train(trainer, groups)
    first = trainer.batch_std
    train(trainer, groups, format=100.0, correctness=100.0)
    assert first is not None
    assert trainer.batch_std == pytest.approx(100 * first, rel=1e-5)


def test_tokens_of_completions_that_were_cut_off_can_be_left_out_of_the_loss(config):
    """All of one prompt's: the step is that of a batch where its advantages are 0."""
    groups = make_groups(config)
    ends = [replace(r, finish="length") for r in groups[0].rollouts]
    cut = [replace(groups[0], rollouts=tuple(ends)), *groups[1:]]
    masked = config.model_copy(
        update={"algorithm": config.algorithm.model_copy(update={"overlong": "mask"})}
    )
    kept, left_out = (train(Trainer(load_policy(c), c), cut) for c in (config, masked))
    assert kept.metrics["completions/clipped_ratio"] == 1 / NUM_PROMPTS
    assert left_out.metrics["completions/clipped_ratio"] == 1 / NUM_PROMPTS
    assert kept.metrics["completions/mean_length"] == left_out.metrics["completions/mean_length"]
    for name in kept.setting.weights:  # The scores count as before.
        assert kept.metrics[f"reward/{name}/mean"] == left_out.metrics[f"reward/{name}/mean"]
    # Over all minibatches: what is left is the tokens of the other prompts.
    tokens = sum(group.num_tokens for group in groups[1:])
    assert left_out.metrics["tokens"] == tokens
    assert kept.metrics["tokens"] == tokens + groups[0].num_tokens


def test_a_gradient_that_is_not_finite_ends_training_with_a_message(config):
    policy = load_policy(config)
    trainer = Trainer(policy, config)
    with torch.no_grad():
        next(policy.model.parameters())[:] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*optimizer\.lr"):
        train(trainer, make_groups(config))
    assert trainer.in_step


def test_the_learning_rate_warms_up_and_falls():
    factors = [lr_factor(u, warmup=2, total=6, schedule="linear") for u in range(6)]
    # 1/3, 2/3, then 4/4, 3/4, 2/4, 1/4
    assert factors == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    assert lr_factor(5, warmup=2, total=6, schedule="constant") == 1.0


def without_signal(groups: list[Group], number: int) -> list[Group]:
    for group in groups[:number]:
        group.scores[:] = 1.0
    return groups


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("correction", gdpo.CORRECTIONS)
def test_groups_without_signal_need_no_gradient(config, correction, minibatches, monkeypatch):
    """The step is the same if they are computed with theirs, which is 0 or a penalty's."""
    changed = with_algorithm(config, correction=correction)
    training = changed.training.model_copy(update={"minibatches": minibatches})
    changed = changed.model_copy(update={"training": training})
    weights, metrics = [], []
    for all_learn in (False, True):
        if all_learn:
            monkeypatch.setattr(Trainer, "_all_learn", True)
        policy = load_policy(changed)
        result = train(Trainer(policy, changed), without_signal(make_groups(changed), 3))
        metrics.append(result.metrics)
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert (weights[1] - weights[0]).abs().mean() < 1e-2 * config.optimizer.lr
    assert metrics[0]["tokens"] == metrics[1]["tokens"]
    if minibatches == 1:  # With more, it tells them how far the first updates moved the policy.
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("aggregation", gdpo.AGGREGATIONS)
@pytest.mark.parametrize("correction", gdpo.CORRECTIONS)
def test_gradients_of_the_head_that_are_made_early_change_nothing(
    config, correction, aggregation, monkeypatch
):
    changed = with_algorithm(config, correction=correction, aggregation=aggregation)
    weights = []
    for early in (False, True):
        if early:
            monkeypatch.setattr(gdpo.heads, "_EARLY_WEIGHTS", 0)
            # What was announced has to be what came.
            monkeypatch.setattr(gdpo.heads, "chunk_gradient", lambda *_: pytest.fail("made late"))
            if not changed.algorithm.make_correction().by_token:
                return
        policy = load_policy(changed)
        train(Trainer(policy, changed), make_groups(changed))
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert (weights[1] - weights[0]).abs().mean() < 1e-2 * config.optimizer.lr


@pytest.mark.parametrize(
    ("algorithm", "passes"),
    [({}, 3), ({"kl_coefficient": 0.1}, 6), ({"entropy_coefficient": 0.1}, 6)],
)
def test_only_what_has_a_gradient_is_computed_with_one(config, algorithm, passes, monkeypatch):
    changed = with_algorithm(config, **algorithm)
    learning = []
    loss = Trainer._loss

    def counted(self, rows, *arguments):
        learning.extend([torch.is_grad_enabled()] * len(set(rows.sequence_N.tolist())))
        return loss(self, rows, *arguments)

    monkeypatch.setattr(Trainer, "_loss", counted)
    train(
        Trainer(load_policy(changed), changed),
        without_signal(make_groups(changed), NUM_PROMPTS - 3),
    )
    assert learning.count(True) == passes * NUM_ROLLOUTS
    assert len(learning) == NUM_PROMPTS * NUM_ROLLOUTS
