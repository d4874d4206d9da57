"""The configuration: what is read, what is refused and how, and that it can be written again."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

import gdpo
from learner.config.algorithm import (
    LIMITS,
    AggregationName,
    CorrectionName,
    EstimatorName,
    KlName,
)
from learner.config.data import HeldoutSet
from learner.config.file import load_config
from learner.config.run import RunConfig
from protocol.errors import ConfigError

MINIMAL = """
[model]
path = "base"
[data]
train = "train.jsonl"
[[rewards]]
name = "format"
function = "tasks:format_reward"
when = { reward = "length", at_least = 0.5 }
[[rewards]]
name = "length"
function = "tasks:length_reward"
"""


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> RunConfig:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> str:
    """The one line that a user sees."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


# ---- Good configurations -----------------------------------------------------------------------


def test_the_example_loads_and_its_paths_are_found_from_anywhere(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(recipe)
    assert config.name == "tool_calling_tiny"
    assert [reward.name for reward in config.rewards] == ["format", "correctness"]
    for path in (config.model.path, config.data.train, config.data.heldout):
        assert path is not None
        assert Path(path).is_absolute()
        assert Path(path).exists()


def test_what_is_not_there_stays_a_name_for_the_hub(tmp_path):
    config = load(tmp_path, "model.path=org/model")
    assert (config.model.path, config.data.train) == ("org/model", "train.jsonl")


def test_paths_are_relative_to_the_file_not_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "recipe.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path.parent)
    config = load_config(Path(tmp_path.name) / "recipe.toml")
    assert config.model.path == str(tmp_path / "base")


def test_the_resolved_configuration_reads_back_as_the_same(recipe, tmp_path):
    config = load_config(
        recipe, ["optimizer.lr=3e-7", "rewards.format.weight=0.25", "optimizer.betas=[0.8, 0.9]"]
    )
    copy = tmp_path / "config.toml"
    copy.write_text(config.to_toml())
    assert load_config(copy) == config
    assert load_config(copy).to_toml() == config.to_toml()


def test_a_condition_survives_the_round_trip(tmp_path):
    config = load(tmp_path)
    again = load(tmp_path, text=config.to_toml())
    when = again.rewards[0].when
    assert when is not None
    assert when.at_least == 0.5
    assert again == config


def test_actors_get_the_rewards_and_the_sampling_of_the_run(tmp_path):
    actor = load(tmp_path, "sampling.max_tokens=7", "actor.max_leases=3").for_actors()
    assert [reward.name for reward in actor.rewards] == ["format", "length"]
    assert (actor.sampling.max_tokens, actor.max_leases) == (7, 3)


def test_the_names_of_algorithms_are_those_that_gdpo_has():
    assert get_args(EstimatorName) == tuple(gdpo.ESTIMATORS)
    assert {*get_args(CorrectionName)} == {*gdpo.CORRECTIONS}
    assert {*get_args(AggregationName)} == {*gdpo.AGGREGATIONS}
    assert {*get_args(KlName)} == {*gdpo.KL_PENALTIES}


@pytest.mark.parametrize("correction", get_args(CorrectionName))
def test_the_limits_of_a_correction_are_those_that_its_class_has(correction):
    assert [*LIMITS[correction]] == [f.name for f in fields(gdpo.CORRECTIONS[correction])]


def test_the_algorithm_builds_the_correction_with_the_limits_that_are_set(tmp_path):
    plain = load(tmp_path, "algorithm.correction=gspo").algorithm.make_correction()
    assert plain == gdpo.Gspo()
    capped = load(tmp_path, "algorithm.weight_cap=3", "algorithm.clip_high=0.28")
    assert capped.algorithm.make_correction() == gdpo.Icepop(weight_cap=3.0, clip_high=0.28)


def test_a_limit_that_the_correction_does_not_have_is_refused_with_those_it_has(tmp_path):
    message = refusal(tmp_path, "algorithm.correction=ppo", "algorithm.weight_cap=3")
    assert "algorithm: the correction ppo has no weight_cap; " in message
    assert "its limits are clip_low and clip_high" in message


# ---- Overrides ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("training.steps=7", "training.steps", 7),
        ("optimizer.betas=[0.5, 0.6]", "optimizer.betas", (0.5, 0.6)),
        ("algorithm.estimator=grpo", "algorithm.estimator", "grpo"),
        ("algorithm.estimator='grpo'", "algorithm.estimator", "grpo"),
        ("endpoints.bind=tcp://127.0.0.1:0", "endpoints.bind", "tcp://127.0.0.1:0"),
        ("name=other", "name", "other"),
        ("rewards.length.weight=3", "rewards.1.weight", 3),
        ("rewards.format.when.at_least=1", "rewards.0.when.at_least", 1),
        ("data.heldout=a=b", "data.heldout", "a=b"),
        ("optimizer.lr = 1e-5", "optimizer.lr", 1e-5),
        ("algorithm.estimator = grpo", "algorithm.estimator", "grpo"),
    ],
)
def test_an_override_sets_one_value(tmp_path, override, key, value):
    assert value_at(load(tmp_path, override), key) == value


def test_the_last_of_two_overrides_wins(tmp_path):
    assert load(tmp_path, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.lr", "'optimizer.lr' is no override; write key.sub=value"),
        ("=3", "is no override"),
        ("optimizer..lr=3", "is no override"),
        ("rewards.speed.weight=1", "nothing is named 'speed'; there are format, "),
        ("rewards.format=1", "rewards holds no keys"),
        ("seed.sub=1", "seed: "),
        ("training=3", "training: "),
        ("optimizer.lr=fast", "optimizer.lr: "),
        ("optimizer.lr.sub=3", "optimizer.lr: "),
        ("model.path.sub=3", "model.path holds no keys"),
        ("model.path.sub.sub=3", "'sub' is below a plain value"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(tmp_path, override, problem):
    assert problem in refusal(tmp_path, override)


# ---- Unknown keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "unknown", "near"),
    [
        ("sed=1", "sed", "seed"),
        ("trainin.lr=1", "trainin.lr", "optimizer.lr"),
        ("max_staleness=1", "max_staleness", "training.max_staleness"),
        ("training.max_stalenes=1", "training.max_stalenes", "training.max_staleness"),
        ("algorithm.estimater=grpo", "algorithm.estimater", "algorithm.estimator"),
        ("rewards.length.wieght=1", "rewards.1.wieght", "rewards.1.weight"),
        ("rewards.format.when.atleast=1", "rewards.0.when.atleast", "rewards.0.when.at_least"),
        (
            "rewards.format.schedule=[{step=2,weight=1}]",
            "rewards.0.schedule.0.step",
            "rewards.0.schedule.0.from_step",
        ),
        ("actor.max_lease=1", "actor.max_lease", "actor.max_leases"),
        ("learner.steps=1", "learner.steps", "training.steps"),
        ("optimizer.steps=1", "optimizer.steps", "training.steps"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", "optimizer.lr"),
        ("actor.sampling.max_tokens=3", "actor.sampling.max_tokens", "sampling.max_tokens"),
        ("actor.rewards=[]", "actor.rewards", "[[rewards]]"),
        ("eval.max_bytes=1", "eval.max_bytes", "buffer.max_bytes"),
        ("weights.timout_s=1", "weights.timout_s", "weights.timeout_s"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, override, unknown, near):
    assert f"unknown key {unknown}; did you mean {near}" in refusal(tmp_path, override)


@pytest.mark.parametrize("key", ["model.lora", "lora.rank", "training.5", "optimizer.momentum"])
def test_a_key_that_nothing_is_near_gets_no_guess(tmp_path, key):
    message = refusal(tmp_path, f"{key}=1")
    assert f"unknown key {key}: there is no such setting" in message
    assert "did you mean" not in message


def test_every_problem_is_named_at_once(tmp_path):
    message = refusal(tmp_path, "optimizer.lr=0", "sed=1")
    assert "optimizer.lr: " in message
    assert "unknown key sed" in message


# ---- Sets of held-out prompts ------------------------------------------------------------------

SETS = """
[eval]
num_rollouts = 8
pass_when = { reward = "length", at_least = 1 }
pass_at = [8, 1, 4]
[[eval.sets]]
name = "greedy"
temperature = 0
[[eval.sets]]
name = "hard"
data = "hard.jsonl"
split = "test"
prompts = 20
num_rollouts = 4
pass_at = [2]
"""


def test_a_set_takes_from_eval_and_data_what_it_does_not_say(tmp_path):
    (tmp_path / "hard.jsonl").write_text("")
    text = MINIMAL + SETS
    heldout, greedy, hard = load(tmp_path, "data.heldout=h", text=text).heldout_sets
    assert heldout == HeldoutSet("heldout", "h", "train", 128, 8, 1.0, (1, 4, 8))
    # All greedy rollouts of a prompt are the same; of the k that is asked for, 1 is left.
    assert greedy == HeldoutSet("greedy", "h", "train", 128, 1, 0.0, (1,))
    assert hard == HeldoutSet("hard", str(tmp_path / "hard.jsonl"), "test", 20, 4, 1.0, (2,))


def test_sets_are_written_into_the_resolved_configuration(tmp_path):
    config = load(tmp_path, "data.heldout=h", text=MINIMAL + SETS)
    assert load(tmp_path, text=config.to_toml()) == config


def test_a_set_goes_by_its_name_in_overrides(tmp_path):
    overrides = ("data.heldout=h", "eval.sets.hard.prompts=3")
    assert load(tmp_path, *overrides, text=MINIMAL + SETS).heldout_sets[2].prompts == 3


def test_without_a_reward_to_pass_by_there_is_no_pass_at_k(tmp_path):
    assert load(tmp_path, "data.heldout=h").heldout_sets[0].pass_at == ()


def test_sets_that_vllm_cannot_sample_are_refused(tmp_path):
    overrides = ("data.heldout=h", "actor.engine=vllm", "eval.sets.hard.temperature=5")
    message = refusal(tmp_path, *overrides, text=MINIMAL + SETS)
    assert "eval.sets.hard.temperature = 5: vLLM takes 0.01 to 2" in message


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("eval.num_rollouts=4", "eval.pass_at = 8 needs eval.num_rollouts of at least as many"),
        ("eval.sets.hard.pass_at=[9]", "eval.sets.hard.pass_at = 9 needs eval.sets.hard.num_roll"),
        ("eval.sets.hard.name=heldout", "the name 'heldout' (which is that of data.heldout)"),
        ("eval.sets.hard.pass_at=[0]", "eval.sets.1.pass_at.0: "),
        ("eval.sets.hard.rollouts=2", "unknown key eval.sets.1.rollouts"),
        ("eval.sets.soft.prompts=2", "nothing is named 'soft'; there are greedy, hard"),
    ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path, override, problem):
    assert problem in refusal(tmp_path, "data.heldout=h", override, text=MINIMAL + SETS)


# ---- Invalid values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.lr=0", "optimizer.lr: "),
        ("optimizer.lr=nan", "optimizer.lr: "),
        ("optimizer.lr=inf", "optimizer.lr: "),
        ("training.steps=1.5", "training.steps: "),
        ("algorithm.estimator=gdp", "algorithm.estimator: "),
        ("algorithm.clip_low=1.5", "algorithm.clip_low: "),
        ("algorithm.tv_limit=2", "algorithm.tv_limit: "),
        ("name=../other", "name: "),
        ("name=''", "name: "),
        ("rewards.format.name=Format", "rewards.0.name: "),
        ("rewards.format.function=tasks", "write package.module:function"),
        ("rewards.format.function='tasks:a b'", "write package.module:function"),
        ("rewards.format.function='os.system;x:f'", "write package.module:function"),
        ("rewards.format.weight=nan", "rewards.0.weight: "),
        ("rewards.format.when.reward=speed", "the rewards are format, length"),
        (
            'rewards.format.schedule=[{from_step=2,when={reward="speed",at_least=1}}]',
            "rewards.format.when names 'speed'; the rewards are format, length",
        ),
        ("rewards.format.schedule=[{from_step=2}]", "needs a weight, a when or always = true"),
        ("rewards.format.schedule=[{from_step=0,weight=1}]", "greater than 0"),
        ("rewards.format.schedule=[{from_step=999,weight=1}]", "up to step 999, the run up to 100"),
        ("rewards.format.weight=1e39", "less than or equal to"),
        ("sampling.top_p=0.9", "top_p cannot be set: the learner computes the log-probabilities"),
        ("buffer.lag=5", "buffer.lag = 5 is above training.max_staleness = 4"),
        ("buffer.max_groups=3", "can never hold"),
        ("eval.every_steps=-1", "eval.every_steps: "),
        ("eval.every_steps=5", "there is nothing to evaluate on: set data.heldout or eval.sets"),
        ("eval.sets=[{name='Hard', data='x'}]", "eval.sets.0.name: "),
        ("eval.sets=[{name='hard'}]", "eval.sets.hard: neither its data nor data.heldout is set"),
        (
            "eval.sets=[{name='a', data='x'}, {name='a', data='y'}]",
            "two of eval.sets have the name 'a'; give each its own",
        ),
        (
            "eval.pass_when={reward='speed', at_least=1}",
            "eval.pass_when names 'speed'; the rewards are format, length",
        ),
        (
            "eval.sets=[{name='a', data='x', pass_at=[2]}]",
            "eval.sets.a.pass_at needs eval.pass_when: which rollouts pass?",
        ),
        ("weights.push_every=0", "weights.push_every: "),
        ("weights.push_every=6", "push_every = 6 needs training.max_staleness of at least 5"),
        (
            "rewards.format.schedule=[{from_step=5,weight=1},{from_step=5,weight=2}]",
            "the schedule's steps are [5, 5]: write each once, in order",
        ),
        ("rewards.length.name=format", "two rewards have the same name"),
        ("rewards=[]", "rewards: "),
        ("training.minibatches=999", "exceeds training.batch_groups = 32"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas"),
        ("endpoints.metrics_port=70000", "endpoints.metrics_port"),
        ("model.path=~nobody-has-this-name/model", "model.path"),
    ],
)
def test_an_invalid_value_is_refused_in_one_line(tmp_path, override, problem):
    assert problem in refusal(tmp_path, override)


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    problem = refusal(tmp_path, "buffer.lag=1", "algorithm.no_signal=refill")
    assert 'algorithm.no_signal = "refill" does not go with buffer.lag' in problem


@pytest.mark.parametrize("missing", ["model", "data", "rewards"])
def test_a_missing_table_is_named(tmp_path, missing):
    start = {"model": "[model]", "data": "[data]", "rewards": "[[rewards]]"}[missing]
    after = {"model": "[data]", "data": "[[rewards]]", "rewards": ""}[missing]
    begin = MINIMAL.index(start)
    end = MINIMAL.index(after) if after else len(MINIMAL)
    assert f"{missing} is missing" in refusal(tmp_path, text=MINIMAL[:begin] + MINIMAL[end:])


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read {path}: "):
            load_config(path)


@pytest.mark.parametrize("content", [b"[model", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_refused(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no valid TOML") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_was_copied_finds_no_data_of_its_old_folder(recipe, tmp_path):
    copied = shutil.copy(recipe, tmp_path / "copy.toml")
    assert load_config(Path(copied)).model.path == "tool_calling_tiny/base"
