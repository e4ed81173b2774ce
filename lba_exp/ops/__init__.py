"""The operator: pure functions on tensors, no modules, no configuration."""

from lba_exp.ops.api import (
    FORMS,
    MODEL_FORMS,
    bidirectional_linear_attention,
    bidirectional_linear_attention_parts,
    can_run_fused,
    choose_form,
)
from lba_exp.ops.decays import CONVENTIONS, step_log_decays
from lba_exp.ops.delta_rule import bidirectional_delta_rule
from lba_exp.ops.estimates import estimate_bytes
from lba_exp.ops.fused_scan import selective_scan_obstacle
from lba_exp.ops.multi_scan import bidirectional_linear_attention_scans, divided_means
from lba_exp.ops.selective_scan import selective_scan
from lba_exp.ops.streaming import start_state, stream

__all__ = [
    "CONVENTIONS",
    "FORMS",
    "MODEL_FORMS",
    "bidirectional_delta_rule",
    "bidirectional_linear_attention",
    "bidirectional_linear_attention_parts",
    "bidirectional_linear_attention_scans",
    "can_run_fused",
    "choose_form",
    "divided_means",
    "estimate_bytes",
    "selective_scan",
    "selective_scan_obstacle",
    "start_state",
    "step_log_decays",
    "stream",
]
