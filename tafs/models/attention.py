"""The kernels that compute a network's attention: backends of diffusers, by its names.

Those are left out that have no gradients (SageAttention, FlashAttention 3), return wrong ones
(cuDNN's), or are downloaded when a job starts.
"""

from __future__ import annotations

from typing import Any, Literal

Attention = Literal[
    "native",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "flash",
    "flex",
    "xformers",
]


def choose(network: Any, backend: Attention) -> None:
    """Let a network of diffusers compute attention with a backend; "native" is PyTorch's choice.

    Networks whose layers take no backend keep PyTorch's choice, which is printed.

    Raises:
        ValueError: this machine lacks what the backend needs; one line.
    """
    if backend == "native":
        return
    try:
        network.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"attention: {backend!r} cannot be used here ({reason}); set another one in the scale"
        ) from None
    processors = [getattr(module, "processor", None) for module in network.modules()]
    if not any(getattr(one, "_attention_backend", None) for one in processors):
        kind = type(network).__name__
        print(f"attention: the layers of a {kind} take no backend; PyTorch chooses", flush=True)
