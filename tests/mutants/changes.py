"""All wrong changes."""

from mutants import integration, kernels, layer, packaging, plan, verdicts
from mutants.change import Change

CHANGES: tuple[Change, ...] = (
    plan.CHANGES + kernels.CHANGES + layer.CHANGES + integration.CHANGES + verdicts.CHANGES + packaging.CHANGES
)
