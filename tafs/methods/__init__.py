"""Training methods: what the file of a method imports.

`Method` is the base class, `PolicyGradient` that of policy-gradient methods (`Branching` that of
those whose stochastic steps branch off one trajectory), `ForwardProcess` that of methods that learn
from noised copies of their images. `Trajectory`, `UpdateInputs` and `LossPart` are what a method
exchanges with the training loop. The methods themselves are plug-ins, found by
`tafs.methods.registry`.
"""

from tafs.methods.base import LossPart, Method, Trajectory, UpdateInputs
from tafs.methods.branching import Branching
from tafs.methods.forward_process import ForwardProcess
from tafs.methods.group_relative import GroupRelative
from tafs.methods.policy_gradient import PolicyGradient

__all__ = [
    "Branching",
    "ForwardProcess",
    "GroupRelative",
    "LossPart",
    "Method",
    "PolicyGradient",
    "Trajectory",
    "UpdateInputs",
]
