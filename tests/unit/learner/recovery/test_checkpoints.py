"""Checkpoints: training goes on from one as if it had never stopped, and a bad one is not read."""

import json
import logging
import resource
import time
import weakref
import zipfile
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from learner.config.file import load_config
from learner.config.run import RunConfig
from learner.recovery import checkpoints as module
from learner.recovery.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_tensors,
    newest,
    oldest,
)
from learner.recovery.resume import load_trainer
from learner.state import GroupState, LeaseState, OpenPrompts, RewardState, RunState
from learner.training.policy import Policy, load_policy
from learner.training.reward_settings import RewardSchedule
from learner.training.shards import gathered
from learner.training.trainer import Trainer
from protocol.errors import ConfigError, TrainingError
from tests.unit.learner.training.test_trainer import make_groups, train

QUICK = ["training.batch_groups=6", "training.minibatches=2", "training.steps=9"]


@pytest.fixture
def config(recipe: Path) -> RunConfig:
    return load_config(recipe, QUICK)


def the_newest(folder: Path) -> Checkpoint:
    checkpoint = newest(folder)
    assert checkpoint is not None
    return checkpoint


def make_state(version: int, trainer: Trainer | None = None) -> RunState:
    setting = trainer.batch_std_setting if trainer else None
    return RunState(
        run_id="test/1",
        version=version,
        prompts=OpenPrompts(next_prompt_index=9, leased=(7, 8), waiting=(3,), buffered=(5, 6)),
        next_lease=12,
        leases={"train": LeaseState(received=7, failed={"deadline": 1}, outstanding=2)},
        groups=GroupState(trained=5, ended_tokens=50, buffered=2, buffered_tokens=20),
        rewards=RewardState({"format": {"weight": 1.0, "when": None}}, version, (), 0),
        batch_std=trainer.batch_std if trainer else None,
        batch_std_setting=setting.as_json() if setting else None,
        tokens_trained=100,
        tokens_generated=200,
        training_seconds=1.5,
        lag0_difference=None,
        counters={"bad_messages": 1},
    )


class Trained:
    """A policy that is trained, and its checkpoints."""

    def __init__(self, config: RunConfig, folder: Path, keep: int = 2) -> None:
        self.config = config
        self.policy = load_policy(config)
        self.trainer = Trainer(self.policy, config)
        self.written: list[int] = []
        self.checkpoints = Checkpoints(
            folder, self.policy, keep=keep, on_written=lambda: self.written.append(1)
        )

    def step(self) -> float:
        groups = make_groups(self.config, seed=self.trainer.version)
        return train(self.trainer, groups).metrics["loss"]

    def begin(self) -> None:
        state = make_state(self.trainer.version, self.trainer)
        self.checkpoints.begin(state, self.trainer.state_tensors())

    def save(self) -> None:
        self.begin()
        self.checkpoints.finish()

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.policy.model.named_parameters()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(config, folder) -> Trained:
    """With checkpoints of the steps 1 and 2."""
    trained = Trained(config, folder)
    for _ in range(2):
        trained.step()
        trained.save()
    return trained


def assert_equal_bits(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name


# ---- Going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.weight_decay=0.1",
        "model.dtype=bfloat16",
        "optimizer.master_weights=false",
        "algorithm.batch_std_ema=0.5",
        "algorithm.kl_coefficient=0.1",
        "algorithm.proximal=interpolated",
    ],
)
def test_guarantee_7_training_goes_on_from_a_checkpoint_as_without_it(recipe, folder, override):
    config = load_config(recipe, [*QUICK, override])
    trained = Trained(config, folder)
    for _ in range(2):
        trained.step()
    trained.save()
    losses = [trained.step() for _ in range(3)]

    checkpoint = the_newest(folder)
    assert checkpoint.version == 2
    again = Trained(config, folder)
    again.policy, again.trainer = load_trainer(config, checkpoint)
    assert [again.step() for _ in range(3)] == losses
    assert_equal_bits(again.weights(), trained.weights())
    assert_equal_bits(again.trainer.state_tensors(), trained.trainer.state_tensors())


def tied_policy(policy: Policy, tmp_path: Path) -> Policy:
    """With an output layer that is the embedding."""
    settings = AutoConfig.from_pretrained(policy.folder, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(settings)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return Policy(model, tmp_path, policy.files, policy.files_digest, policy.specs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_written_once_and_are_tied_when_read(config, folder, tmp_path, dtype):
    policy = tied_policy(load_policy(config), tmp_path)
    policy.model.to(dtype)
    Checkpoints(folder, policy, keep=2).begin(make_state(3), {"x": torch.ones(2)})
    wait_for_checkpoint(folder)
    [file] = (the_newest(folder).model).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    assert len([name for name in names if "embed" in name or "lm_head" in name]) == 1
    again = AutoModelForCausalLM.from_pretrained(the_newest(folder).model, dtype=dtype)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert_equal_bits(dict(again.named_parameters()), dict(policy.model.named_parameters()))


def wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while newest(folder) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_state_comes_back_as_it_was(saved, folder):
    assert the_newest(folder).state == make_state(2, saved.trainer)
    first = oldest(folder)
    assert first is not None
    assert first.state.version == 1


def test_the_model_of_a_checkpoint_opens_with_its_tokenizer(saved, folder):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(the_newest(folder).model).eos_token_id is not None
    policy = load_policy(saved.config, the_newest(folder).model)
    assert_equal_bits(dict(policy.model.named_parameters()), saved.weights())


def test_guarantee_8_nothing_of_it_is_pickled(saved, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    for path in files:
        assert not zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert list(tensors.keys())


# ---- Writing while training goes on ------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until the test lets it go."""
    go = Event()
    real = module._save_tensors

    def save(*arguments):
        assert go.wait(20)
        real(*arguments)

    monkeypatch.setattr(module, "_save_tensors", save)
    return go


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    config, folder, slow_disk
):
    trained = Trained(config, folder)
    trained.step()
    before = trained.weights()
    optimizer = {n: t.clone() for n, t in trained.trainer.state_tensors().items()}
    trained.begin()
    assert trained.checkpoints.is_writing
    assert trained.checkpoints.versions == []
    trained.step()
    assert trained.written == []
    slow_disk.set()
    trained.checkpoints.finish()
    assert trained.written == [1]
    checkpoint = the_newest(folder)
    assert checkpoint.version == 1
    policy = load_policy(config, checkpoint.model)
    assert_equal_bits(dict(policy.model.named_parameters()), before)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in optimizer.items()}
    load_tensors(checkpoint, tensors)
    assert_equal_bits(tensors, optimizer)


def test_a_second_checkpoint_waits_for_the_first(config, folder, slow_disk):
    trained = Trained(config, folder)
    trained.step()
    trained.begin()
    trained.step()
    second = Thread(target=trained.begin)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    slow_disk.set()
    second.join(20)
    trained.checkpoints.finish()
    assert trained.checkpoints.versions == [1, 2]


def test_only_the_newest_are_kept(config, folder):
    trained = Trained(config, folder, keep=2)
    for _ in range(4):
        trained.step()
        trained.save()
    assert trained.checkpoints.versions == [3, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("step", ["_save_tensors", "_write_manifest"])
def test_one_that_cannot_be_written_is_told_with_the_last_good_one(saved, monkeypatch, step):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, fail)
    saved.step()
    saved.begin()
    expected = (
        r"cannot write the checkpoint .*step-00000003: No space left on device; "
        r"the last good one: step 2; .*gdpo learner --resume "
    )
    with pytest.raises(TrainingError, match=expected):
        saved.checkpoints.finish()
    with pytest.raises(TrainingError, match=expected):
        saved.begin()
    assert saved.written == [1, 1]
    assert the_newest(saved.checkpoints.folder).version == 2
    assert not list(saved.checkpoints.folder.glob("*.partial"))


def test_an_error_inside_of_torch_is_no_less_of_an_error(saved, folder):
    """It comes as no `Exception`, which a handler of those would miss."""
    saved.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The model fits, in float32; the optimiser's state of twice its size does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match="step-00000003: File too large; the last good one"):
            saved.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert the_newest(folder).version == 2
    assert not list(folder.glob("*.partial"))


# ---- What is damaged ---------------------------------------------------------------------------


def some_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "step-00000002").rglob("*") if path.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda path: path.write_text("")])
def test_guarantee_7_a_damaged_checkpoint_is_passed_over_with_a_word(saved, folder, damage, caplog):
    for path in some_files(folder):
        content = path.read_bytes()
        damage(path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = the_newest(folder)
        assert found.version == 1, path
        assert "checkpoint step-00000002 is damaged" in caplog.text
        assert "passed over" in caplog.text
        path.write_bytes(content)
    assert the_newest(folder).version == 2


@pytest.mark.parametrize("text", ["[]", '{"files": []}', '{"files": {"x": 1}}', "null", "{"])
def test_a_manifest_that_says_nothing_is_damaged(saved, folder, text):
    (folder / "step-00000002" / "manifest.json").write_text(text)
    assert the_newest(folder).version == 1


def test_when_all_are_damaged_that_is_an_error_of_its_own(saved, folder):
    for version in (1, 2):
        flip(folder / f"step-{version:08}" / "state.json")
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged: .*00002.*00001"):
        newest(folder)


def test_no_checkpoint_is_none(folder):
    assert newest(folder) is None
    assert oldest(folder) is None


def test_what_is_left_behind_half_written_is_never_read_and_goes(saved, folder):
    (folder / "step-00000002").rename(folder / "step-00000002.partial")
    assert the_newest(folder).version == 1
    Checkpoints(folder, saved.policy, keep=2)
    assert not (folder / "step-00000002.partial").exists()


def test_a_damaged_one_that_is_newer_does_not_stand_in_the_way_of_a_good_one(saved, folder):
    flip(folder / "step-00000002" / "state.json")
    assert the_newest(folder).version == 1
    saved.checkpoints.put_aside_after(1)
    assert saved.checkpoints.versions == [1]
    assert (folder / "step-00000002.damaged").is_dir()
    saved.save()
    assert saved.checkpoints.versions == [1, 2]
    assert the_newest(folder).version == 2


def test_rewards_come_back_with_a_command_that_follows_a_schedule(config):
    """The step that both are for has not begun when the checkpoint is made."""
    changed = load_config(
        Path(config.data.train).parent.parent / "tool_calling_tiny.toml",
        [*QUICK, "rewards.format.schedule=[{from_step=3, weight=9.0}]"],
    )
    rewards = RewardSchedule(changed.rewards, 9)
    rewards.begin(2)
    rewards.command({"format": {"weight": 0.25}})
    again = RewardSchedule(changed.rewards, 9)
    again.restore(rewards.state(), 2)
    assert rewards.begin(3) == again.begin(3)
    assert again.begin(3).weights["format"] == 0.25
    assert again.changes == rewards.changes


def test_a_checkpoint_of_the_trainer_fills_what_it_is_given(saved, folder):
    trainer = Trainer(load_policy(saved.config), saved.config)
    trainer.load_state(2, partial(load_tensors, the_newest(folder)))
    assert trainer.version == 2
    assert_equal_bits(trainer.state_tensors(), saved.trainer.state_tensors())


def test_a_mistake_after_a_checkpoint_is_written_ends_the_run_instead_of_hanging_it(config, folder):
    def mistake() -> None:
        raise KeyError("what to prune")

    trained = Trained(config, folder)
    trained.checkpoints._on_written = mistake
    trained.step()
    with pytest.raises(TrainingError, match="checkpoint died: 'what to prune'"):
        trained.save()
    with pytest.raises(TrainingError, match="what to prune"):
        trained.begin()


@pytest.fixture
def copies(monkeypatch) -> list[weakref.ref[torch.Tensor]]:
    """What checkpoints have copied since the test began."""
    copies: list[weakref.ref[torch.Tensor]] = []

    def copied(tensors, *, keep):
        result = gathered(tensors, keep=keep)
        copies.extend(weakref.ref(tensor) for tensor in result.values())
        return result

    monkeypatch.setattr(module, "gathered", copied)
    return copies


def alive(copies: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(copy() is not None for copy in copies)


def test_no_copy_of_the_model_outlives_its_checkpoint(config, folder, copies):
    """Not until the next one, which may be hours away; nor are there ever two."""
    trained = Trained(config, folder)
    trained.step()
    for _ in range(5):
        trained.save()
        assert (len(copies) > 0, alive(copies)) == (True, 0)
        copies.clear()
        trained.step()


def test_no_copy_of_the_model_outlives_a_checkpoint_that_cannot_be_written(
    config, folder, copies, monkeypatch
):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_manifest", fail)
    trained = Trained(config, folder)
    trained.step()
    with pytest.raises(TrainingError, match="No space left"):
        trained.save()
    deadline = time.monotonic() + 20
    while alive(copies) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (len(copies) > 0, alive(copies)) == (True, 0)
