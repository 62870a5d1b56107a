"""Which entries of a config may differ between two checkpoints of one model."""

from __future__ import annotations

import pytest

from inlay.lowering.same_model import NOT_COMPUTED


@pytest.mark.parametrize(
    "name",
    [
        "output_attentions",
        "output_router_logits",
        "text_config.output_hidden_states",
        "attention_dropout",
        "resid_pdrop",
        "encoder_layerdrop",
        "drop_path_rate",
        "summary_first_dropout",
        "eos_token_id",
    ],
)
def test_what_no_number_depends_on(name: str) -> None:
    assert NOT_COMPUTED.search(name)


@pytest.mark.parametrize(
    "name",
    [
        "output_gate_type",
        "output_multiplier",
        "output_logit_soft_cap",
        "output_dim",
        "normalize_router_prob_before_dropping",
        "num_output_groups",
        "hidden_size",
        "rope_parameters.rope_theta",
    ],
)
def test_what_the_graph_may_depend_on(name: str) -> None:
    """Names of configs in transformers that look like those above."""
    assert not NOT_COMPUTED.search(name)
