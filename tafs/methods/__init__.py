"""Training methods: what the file of a method imports.

`Method` is the base class, `PolicyGradient` that of policy-gradient methods; `Trajectory`,
`UpdateInputs` and `LossPart` are what a method exchanges with the training loop. The methods
themselves are plug-ins, found by `tafs.methods.registry`.
"""

from tafs.methods.base import LossPart, Method, Trajectory, UpdateInputs
from tafs.methods.policy_gradient import PolicyGradient

__all__ = ["LossPart", "Method", "PolicyGradient", "Trajectory", "UpdateInputs"]
