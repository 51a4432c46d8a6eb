"""The metrics that every evaluation computes, whichever plug-ins there are."""

from __future__ import annotations

from tafs.rewards import metrics

METRICS = {
    name: metric
    for name, metric in metrics.METRICS.items()
    if not (metric.optional or metric.quotes)
}
