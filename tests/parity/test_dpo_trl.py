"""Ten steps of preference learning, from a configuration file to an exported model, against TRL's trainers.

Every loss, with the whole model and with an adapter, with one microbatch a step and with two: all but a few of these
are slow.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.parity.preference_runs import Adapter, assert_same, both, pairs, strings

LOSSES: dict[str, dict[str, Any]] = {  # every `loss_type` of DPOConfig, with what acts on it
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.1},
    "sft": {},
    "sigmoid_norm": {},
}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
WPO = {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.01], "use_weighting": True}


class Case(NamedTuple):
    """What both are told; rows are lists of messages, or text."""

    settings: dict[str, Any]
    adapter: Adapter = None
    accumulation: int = 1
    rows: str = "messages"


OPTIONS: dict[str, Case] = {
    "a weighted mixture": Case(MPO),
    "a weighted mixture, an adapter, two microbatches": Case(MPO, adapter="new", accumulation=2),
    "pairs weighted by how likely they are": Case(WPO),
    "pairs weighted, an adapter, two microbatches": Case(WPO, adapter="new", accumulation=2),
    "forward KL": Case({"f_divergence_type": "forward_kl"}),
    "Jensen-Shannon": Case({"f_divergence_type": "js_divergence"}),
    "alpha divergence": Case({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "Jensen-Shannon by token": Case({"loss_type": "ipo", "f_divergence_type": "js_divergence"}),
    "the longer answer's end weighs less": Case({"ld_alpha": 0.3}),
    "the longer answer's end weighs nothing, an adapter": Case({"ld_alpha": 0.0}, adapter="new"),
    "another beta": Case({"beta": 0.5}),
    "answers and prompts that are cut": Case({"max_length": 24}, accumulation=2),
    "an adapter that is trained on": Case({}, adapter="of peft"),
    "an adapter that is trained on, by token, two microbatches": Case(
        {"loss_type": "ipo"}, adapter="of peft", accumulation=2
    ),
    "text": Case({}, rows="text"),
    "text with one token across the boundary": Case({}, rows="text cut inside a word"),
    "a reference computed beforehand": Case({"precompute_ref_log_probs": True}, accumulation=2),
    "a reference computed beforehand, an adapter": Case({"precompute_ref_log_probs": True}, adapter="new"),
    "a reference that moves": Case({"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.6}),
}
GRID: dict[str, Case] = {
    f"{loss}, {adapter or 'whole'}, {accumulation}": Case({"loss_type": loss, **more}, adapter, accumulation)
    for (loss, more), adapter, accumulation in itertools.product(LOSSES.items(), (None, "new"), (1, 2))
}
CASES = GRID | OPTIONS
QUICK = ("sigmoid, whole, 2", "ipo, new, 1")

# The losses without a reference are those of other trainers of TRL's, under these names there. They add an
# end-of-sequence token even after a template that has one, so rows are text, which gets one from either.
OF_POLICY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cpo": ("cpo", {}, {"loss_type": "sigmoid"}),
    "cpo, some labels wrong": ("cpo", {"label_smoothing": 0.1}, {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    "cpo_hinge": ("cpo", {"cpo_alpha": 0.5}, {"loss_type": "hinge", "cpo_alpha": 0.5}),
    "cpo_ipo": ("cpo", {}, {"loss_type": "ipo"}),
    "simpo": ("cpo", {"cpo_alpha": 0.0}, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "simpo, of AlphaPO": ("cpo", {"alpha": 0.25}, {"loss_type": "simpo", "alpha": 0.25}),
    "orpo": ("orpo", {}, {}),
}
# Theirs are means over padding too; and a likelihood that does not count is logged as 0.
NOT_OURS = ("logits/chosen", "logits/rejected")


def rows_of(kind: str) -> list[dict[str, Any]]:
    if kind == "messages":
        return pairs()
    if kind == "text":
        return strings()
    return [  # the last letters of a prompt's last word begin its answers
        {"prompt": row["prompt"][:-3], **{name: row["prompt"][-3:] + row[name] for name in ("chosen", "rejected")}}
        for row in strings()
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_ten_steps_are_those_of_trl(name, tiny_chat_model, tmp_path):
    case = CASES[name]
    ours, theirs = both(
        "TRL_DPO",
        "dpo",
        tiny_chat_model,
        rows_of(case.rows),
        tmp_path,
        settings=case.settings,
        adapter=case.adapter,
        accumulation=case.accumulation,
    )
    assert_same(ours, theirs, beta=case.settings.get("beta", 0.1))
    if case.settings == {"loss_type": "sigmoid"}:  # policy and reference are one at first, to the last bit
        assert ours.log["loss"][0] == pytest.approx(np.log(2), rel=1e-7)
        assert {ours.log[f"rewards/{name}"][0] for name in ("chosen", "rejected", "accuracies", "margins")} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("adapter", [None, "new"])
@pytest.mark.parametrize("name", OF_POLICY)
def test_ten_steps_without_a_reference_are_those_of_trl(name, adapter, accumulation, tiny_chat_model, tmp_path):
    kind, settings, instead = OF_POLICY[name]
    ours, theirs = both(
        "TRL_DPO",
        kind,
        tiny_chat_model,
        strings(),
        tmp_path,
        settings={"loss_type": name.split(",")[0], **settings},
        instead=instead,
        adapter=adapter,
        accumulation=accumulation,
    )
    assert_same(ours, theirs, but=NOT_OURS + (("nll_loss",) if settings.get("cpo_alpha") == 0 else ()))
