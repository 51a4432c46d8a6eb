"""Reward models and metrics, a file each, behind one registry."""

METRICS = ("geneval", "pickscore", "clip", "hpsv2", "imagereward", "unifiedreward")
DIFFERENTIABLE = frozenset({"pickscore", "clip", "hpsv2", "imagereward", "unifiedreward"})
# The published models that each is made of, entries of resources.yaml.
RESOURCES = {
    "pickscore": ("pickscore", "clip-vit-h-14"),
    "clip": ("clip-vit-l-14",),
    "hpsv2": ("hpsv2",),
    "imagereward": ("imagereward", "bert-base-uncased"),
    "geneval": ("mask2former", "clip-vit-l-14"),
    "unifiedreward": ("unifiedreward", "siglip"),
}
SERVED = "unifiedreward"  # the published model is behind a server: `unifiedreward.UnifiedReward`
