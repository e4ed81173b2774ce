"""Settings of a mixer that do not fit together. No torch in here: a configuration is checked with it before torch is imported."""

from __future__ import annotations

from typing import Any

VECTOR_GATES = ("fixed_vector", "selective_vector", "low_rank_vector", "softplus_vector")
SELECTIVE_GATES = ("selective", "selective_vector", "low_rank_vector", "softplus_vector")
SCALAR_GATES = ("none", "fixed", "selective")
HIPPO = ("hippo", "hippo_lin")
DT_MIN, DT_MAX = 1e-3, 1e-1


def linear_conflict(settings: dict[str, Any]) -> str | None:
    """The first pair of settings of ``LinearAttention`` that do not fit, as ``key=value needs ...``; None where all fit.

    Args:
        settings: the layer's keyword arguments, all of them. Gates that a plugin registers are left to themselves.
    """
    gate, init = settings["gate"], settings["gate_init"]
    if gate in SCALAR_GATES and init in HIPPO:
        return f"gate_init={init} needs one decay per channel: gate=fixed_vector, selective_vector or low_rank_vector, got gate={gate}"
    if gate in VECTOR_GATES and init == "retnet":
        return f"gate_init=retnet needs one decay per head: gate=fixed or selective, got gate={gate}"
    if init not in HIPPO and (settings["dt_min"], settings["dt_max"]) != (DT_MIN, DT_MAX):
        return f"dt_min and dt_max are the step sizes of gate_init=hippo and hippo_lin, got gate_init={init}"
    if settings["dt_min"] > settings["dt_max"]:
        return f"dt_min={settings['dt_min']:g} is above dt_max={settings['dt_max']:g}"
    if gate == "none":
        for key, idle, name in (("gate_trained", True, "false"), ("complement_keys", False, "true")):
            if settings[key] != idle:
                return f"{key}={name} needs a gate, got gate=none"
        if settings["scan"] != "raster" and settings["direction"] == "both":
            return f"scan={settings['scan']} changes nothing without decay (gate=none) in both directions: no order is told from another"
    if settings["open_first"] and gate not in SELECTIVE_GATES and gate in SCALAR_GATES + VECTOR_GATES:
        return f"open_first=true needs a gate per token: gate=selective, selective_vector or low_rank_vector, got gate={gate}"
    if settings["diagonal"] == "twice" and settings["direction"] != "both":
        return f"diagonal=twice is the plain sum of two directions: it needs direction=both, got {settings['direction']}"
    if gate == "softplus_vector" and settings["form"] != "parallel":
        return f"gate=softplus_vector has decays above 1: it needs form=parallel, got {settings['form']}"
    if gate in VECTOR_GATES and settings["form"] == "fused":
        return f"form=fused needs one decay per head: gate=none, fixed or selective, got gate={gate}"
    return None


def softmax_conflict(settings: dict[str, Any], defaults: dict[str, Any]) -> str | None:
    """A setting that would mislead beside softmax attention, which has neither decay nor scans, as a sentence; None where there is none."""
    for key in ("gate", "gate_trained", "complement_keys", "open_first", "scale", "norm", "output_gate", "diagonal", "scan"):
        if settings[key] != defaults[key]:
            value = str(settings[key]).lower() if isinstance(settings[key], bool) else settings[key]
            return f"{key}={value} has no meaning in softmax attention, which takes feature_map and direction alone (model=softmax)"
    return None
