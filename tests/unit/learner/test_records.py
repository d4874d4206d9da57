"""Records: the same keys as ever, and never more than JSON holds."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from learner.records import Record, Step, Summary
from learner.status import Status
from tests.unit.record_examples import STEP, SUMMARY
from tests.unit.status_examples import EARLY, WATCHED


def without_newer(status: dict[str, Any]) -> dict[str, Any]:
    actors = [
        {key: value for key, value in actor.items() if key != "newer"} for actor in status["actors"]
    ]
    return status | {"actors": actors}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Status, EARLY),
        (Status, without_newer(WATCHED)),
        (Step, STEP),
        (Summary, SUMMARY),
    ],
)
def test_a_record_is_json_with_the_same_keys_in_the_same_order(
    kind: type[Record], content: dict[str, Any]
):
    record = kind.model_validate(content)
    assert json.dumps(record.model_dump()) == json.dumps(content)
    assert kind.model_validate_json(json.dumps(record.model_dump())) == record


def test_what_a_status_names_is_fit_to_be_shown():
    status = Status.model_validate(EARLY | {"run": "\x1b[2J" + "x" * 100})
    assert status.run.startswith(r"\x1b[2Jxxx")
    assert status.run.isprintable()


def test_a_loss_that_is_no_number_ends_no_run():
    assert math.isnan(Step.model_validate(STEP | {"loss": math.nan}).metrics["loss"])
    summary = Summary.model_validate(SUMMARY | {"lag0_logprob_difference": math.nan})
    assert summary.lag0_logprob_difference is not None


def test_what_actors_claim_costs_no_summary():
    throughput = SUMMARY["throughput"] | {"tokens_generated": 2**70}
    summary = Summary.model_validate(SUMMARY | {"throughput": throughput})
    assert Summary.model_validate_json(json.dumps(summary.model_dump())) == summary


@pytest.mark.parametrize("loss", ["0.5", None, [0.5]])
def test_a_metric_is_a_number(loss: Any):
    with pytest.raises(ValidationError):
        Step.model_validate(STEP | {"loss": loss})
