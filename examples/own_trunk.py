"""Load a model without its experts, and generate with the experts in the pool.

python examples/own_trunk.py [NAME]
"""

from __future__ import annotations

import sys

import torch

import moesaic


def main(name: str = "local") -> None:
    cluster = moesaic.connect(name)
    served = cluster.status().models[0]
    # An ordinary transformers model: call it, train adapters on it, use its `generate`.
    trunk = cluster.from_pretrained(served.name)
    held = sum(parameter.numel() for parameter in trunk.parameters())
    print(f"{held:,} parameters here; {served.experts:,} experts in the pool")
    prompt = torch.tensor([[5, 6, 7, 8]])
    print(trunk.generate(prompt, max_new_tokens=8, do_sample=False).tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
