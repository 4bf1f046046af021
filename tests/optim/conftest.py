"""Some steps are made by the kernels: compiled where there is a GPU, else in the interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # Before the first kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")
