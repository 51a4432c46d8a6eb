"""Reward models and metrics, a file each, behind one registry."""

METRICS = ("geneval", "pickscore", "clip", "hpsv2", "imagereward", "unifiedreward")
DIFFERENTIABLE = frozenset({"pickscore", "clip", "hpsv2", "imagereward", "unifiedreward"})
