"""Shared set-up: one thread, so that sums do not depend on the machine."""

import torch

import tafs  # noqa: F401 - it patches torchvision before any test imports diffusers

torch.set_num_threads(1)
