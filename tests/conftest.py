from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from hirelc_deploy import _torchvision_guard

_torchvision_guard.install()
torch.set_num_threads(1)
