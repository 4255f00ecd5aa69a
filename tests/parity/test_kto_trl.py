"""Ten steps of KTO, from a configuration file to an exported model, against TRL's KTOTrainer on the same rows.

All cases but one are slow.
"""

from typing import Any, NamedTuple

import pytest

from tests.parity.preference_runs import Adapter, assert_same, both, labelled

WEIGHTS = {"desirable_weight": 0.7, "undesirable_weight": 1.5}


class Case(NamedTuple):
    """What both are told."""

    settings: dict[str, Any]
    adapter: Adapter = None
    accumulation: int = 1
    none_to_avoid: slice = slice(0)  # rows of which all are wanted


CASES = {
    "kto": Case({}),
    "kto, weighted, two microbatches": Case(WEIGHTS, accumulation=2),
    "kto, an adapter": Case({}, adapter="new"),
    "kto, an adapter, weighted, two microbatches": Case(WEIGHTS, adapter="new", accumulation=2),
    "kto, an adapter that is trained on": Case({}, adapter="of peft"),
    "kto, answers and prompts that are cut": Case({"max_length": 24}),
    "kto, a batch without an answer to avoid": Case({}, none_to_avoid=slice(16, 24)),
    "kto, another beta": Case({"beta": 0.5}),
    "kto, a reference computed beforehand": Case({"precompute_ref_log_probs": True}, accumulation=2),
    "kto, a reference computed beforehand, an adapter": Case({"precompute_ref_log_probs": True}, adapter="new"),
    "apo": Case({"loss_type": "apo_zero_unpaired"}),
    "apo, weighted, two microbatches": Case({"loss_type": "apo_zero_unpaired", **WEIGHTS}, accumulation=2),
    "apo, an adapter": Case({"loss_type": "apo_zero_unpaired"}, adapter="new"),
    "apo, an adapter, weighted, two microbatches": Case(
        {"loss_type": "apo_zero_unpaired", **WEIGHTS}, adapter="new", accumulation=2
    ),
}
QUICK = "kto, weighted, two microbatches"


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != QUICK)])
def test_ten_steps_are_those_of_trl(name, tiny_chat_model, tmp_path):
    case = CASES[name]
    ours, theirs = both(
        "TRL_KTO",
        "kto",
        tiny_chat_model,
        labelled(none_to_avoid=case.none_to_avoid),
        tmp_path,
        settings=case.settings,
        adapter=case.adapter,
        accumulation=case.accumulation,
    )
    assert_same(ours, theirs, beta=case.settings.get("beta", 0.1))
