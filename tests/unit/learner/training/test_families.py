"""The families of transformers are computed as they compute themselves, in the fastest way."""

from typing import Any

import pytest
import torch

from benchmarks.equality.data import LONGEST, make_forest, singles
from benchmarks.equality.families import FAMILIES, Family, make_family
from benchmarks.equality.steps import compare_steps
from benchmarks.equality.ways import EXACT, Difference, compare_ways, compute, difference
from learner.packing import attention
from learner.packing.attention import PACKED, register
from learner.packing.choice import PLAIN, choose
from learner.packing.forward import Way

BY_NAME = {family.name: family for family in FAMILIES}
PACKED_WAY = Way(packed=True, fused_head=True)
STEPPED = [
    "Qwen2, tied",
    "Gemma 2, window, caps",
    "gpt-oss, window, sinks",
    "Granite, scaled head",
    "BLOOM (ALiBi)",
    "Phi-3, longrope",
]


def equal(found: Difference | None) -> bool:
    return found is None or (found.logprobs < 1e-5 and found.gradients < 1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_way_gives_the_same_log_probabilities_and_gradients(family: Family):
    found = compare_ways(family)
    print(found)
    assert found.way.packed is family.packed
    assert (found.way.max_sequences == 1) is family.one_by_one
    assert found.way.fused_head
    assert equal(found.shared)
    assert equal(found.alone)
    assert equal(found.padded)
    assert equal(found.head)
    assert equal(found.checkpointed)


@pytest.mark.parametrize("name", STEPPED)
def test_five_steps_are_those_of_a_textbook_in_any_split(name: str):
    found = compare_steps(BY_NAME[name])
    print(found)
    assert found.textbook.mean < 1e-3
    assert found.split_weights.mean < 1e-3
    assert found.split_metrics < 1e-4


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("Qwen2, window", "sliding_window"),
        ("Mistral, window", "sliding_window"),
        ("Gemma 2, window, caps", "sliding_window"),
        ("Gemma 2, window, caps", "softcap"),
        ("Gemma 3, window", "sliding_window"),
        ("gpt-oss, window, sinks", "sliding_window"),
        ("gpt-oss, window, sinks", "s_aux"),
        ("Granite, scaled head", "scaling"),
    ],
)
def test_the_families_would_show_what_attention_leaves_out(
    monkeypatch: pytest.MonkeyPatch, name: str, ignored: str
):
    whole = attention.packed_attention

    def partial(*args: Any, **kwargs: Any) -> Any:
        return whole(*args, **kwargs | {ignored: None})

    model = make_family(BY_NAME[name])
    register()
    truth = compute(model, PLAIN, EXACT, singles(make_forest()))
    with monkeypatch.context() as patch:
        patch.setattr(attention, "packed_attention", partial)
        register()
        found = difference(truth, compute(model, PACKED_WAY, PACKED, make_forest()))
        assert found.logprobs > 1e-2
        # The learner finds it out too.
        assert not choose(model, LONGEST).packed
    register()


@pytest.mark.parametrize("name", ["Granite, scaled head", "Cohere, scaled head"])
def test_the_families_would_show_a_head_without_its_scale(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    import gdpo
    from learner.packing import forward

    model = make_family(BY_NAME[name])
    linear = model.get_output_embeddings()
    monkeypatch.setattr(forward, "head_of", lambda _: gdpo.Head(linear.weight))
    assert choose(model, LONGEST) == Way(packed=True, fused_head=False)


def test_the_models_are_the_same_every_time():
    one, other = make_family(FAMILIES[0]), make_family(FAMILIES[0])
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
        assert left.abs().min() > 0
