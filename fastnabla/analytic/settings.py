"""The settings of each method on the analytic testbed, where they differ from residual ∇-DB's."""

import copy
from typing import Any

from fastnabla.analytic.config import AnalyticConfig, MethodName
from fastnabla.config.method_sections import Direct, PolicyGradient
from fastnabla.config.sections import OptimizerConfig


def _adamw(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, beta2=0.95, weight_decay=0.0, schedule="cosine")


SETTINGS: dict[MethodName, dict[str, Any]] = {
    "residual-db": {},
    "db": {"optimizer": _adamw(5e-3), "flow_learning_rate": 1e-2},
    "refl": {"optimizer": _adamw(1e-3)},
    "draft": {"optimizer": _adamw(1e-3), "direct": Direct(k=10)},
    "draft-lv": {"optimizer": _adamw(1e-3)},
    "ddpo": {"optimizer": _adamw(1e-3), "policy_gradient": PolicyGradient(clip=0.1, window=256)},
    "dag": {"optimizer": _adamw(2e-2), "flow_learning_rate": 1e-2},
}
"""Fields of `AnalyticConfig`, by method."""


def settings(method: MethodName, **changes: Any) -> AnalyticConfig:
    """The configuration for `method`, with `changes` of its fields."""
    return AnalyticConfig(method=method, **copy.deepcopy(SETTINGS[method]) | changes)
