"""What can be set: every key is described, and an unknown one leads to those near it."""

import pytest

from learner.config.run import RunConfig
from learner.config.schema import explain, sections
from protocol.errors import ConfigError


def every_key():
    return [key for section in sections() for key in section.keys]


def test_every_key_of_the_configuration_is_there_once():
    paths = [key.path for key in every_key()]
    assert len(set(paths)) == len(paths)
    top = {path.partition(".")[0] for path in paths}
    assert top == set(RunConfig.model_fields)


@pytest.mark.parametrize("key", every_key(), ids=lambda key: key.path)
def test_every_key_says_what_it_means(key):
    assert key.meaning.endswith(".")
    assert key.type
    assert key.default


def test_every_section_says_what_it_is_for():
    assert all(section.meaning for section in sections())


def test_a_key_is_explained_with_all_that_is_known_of_it():
    assert explain("weights.bucket_bytes") == (
        "weights.bucket_bytes\n"
        "  Bytes of weights in one broadcast call; whole MiB.\n"
        "\n"
        "  type:     whole number\n"
        "  range:    above 0, a multiple of 1048576\n"
        "  default:  4194304\n"
        "  section:  [weights]"
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("optimizer.betas", "each at least 0, below 1"),
        ("admission.check_limit", "default:  none"),
        ("buffer.sampling", 'one of "fifo", "freshest"'),
        ("weights.address", "IPv4 address"),
        ("name", "default:  the file's name"),
        ("model.path", "default:  required"),
        ("actor.vllm.tensor_parallel", "[actor.vllm]"),
        ("rewards.weight", "[[rewards]]"),
        ("rewards.format.weight", "[[rewards]]"),
        ("rewards.0.schedule.1.from_step", "[[rewards.schedule]]"),
    ],
)
def test_values_of_every_kind_are_explained(path, expected):
    assert expected in explain(path)


@pytest.mark.parametrize("path", ["training", "[training]"])
def test_a_section_lists_its_keys(path):
    lines = explain(path).splitlines()
    assert lines[0] == "[training]"
    listed = [line.split()[0] for line in lines if "; default " in line]
    assert listed == list(RunConfig.model_fields["training"].annotation.model_fields)


def test_a_section_names_those_inside_it():
    assert "and section actor.vllm" in explain("actor")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("training.lr", "optimizer.lr"),
        ("learner.steps", "training.steps"),
        ("steps", "training.steps"),
        ("learning_rate", "optimizer.lr"),
        ("training.learning_rate", "optimizer.lr"),
        ("batch_size", "training.batch_groups"),
        ("training.timeout_s", "weights.timeout_s or eval.timeout_s"),
        ("rewards.format.wieght", "rewards.format.weight"),
        ("trainin", "training"),
        ("modle.unheard", "a key of [model]"),
    ],
)
def test_an_unknown_key_leads_to_the_nearest(path, near):
    with pytest.raises(ConfigError) as caught:
        explain(path)
    assert str(caught.value) == f"unknown key {path}; did you mean {near}?"


@pytest.mark.parametrize("path", ["lora", "lora.rank", "model.lora", "", ".", "training."])
def test_nothing_is_guessed_where_nothing_is_near(path):
    with pytest.raises(ConfigError, match="there is no such setting"):
        explain(path)


def test_every_synonym_leads_to_a_key():
    for name in ("grad_clip", "group_size", "max_new_tokens", "tensor_parallel_size", "beta"):
        with pytest.raises(ConfigError) as caught:
            explain(name)
        explain(str(caught.value).rpartition(" ")[2].removesuffix("?"))
