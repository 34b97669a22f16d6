"""Compute one MoE layer over the router service: numpy and gRPC, neither Ray nor torch.

The spec needs a router service: `router: {port: 8001}`.

    python examples/hidden_states.py [NAME]
"""

from __future__ import annotations

import sys

import numpy as np

import moesaic


def main(name: str = "local") -> None:
    address = moesaic.connect(name).router
    if address is None:
        sys.exit(f"cluster {name} has no router service; add `router: {{port: 8001}}` to its spec")
    with moesaic.connect(address) as router:
        # numpy has no bfloat16; with such a model give tensors of torch.
        model = next((one for one in router.models() if one.dtype != "bfloat16"), None)
        if model is None:
            sys.exit(f"all models of cluster {name} are bfloat16; set `dtype: float32` for one")
        layer = model.layers[0]
        experts = router.experts(model.name, layer.layer)
        hidden = np.ones((4, layer.hidden), dtype=model.dtype)
        # Four tokens, each with experts 0 and 1 at equal weights, as a gate would have chosen.
        answer = experts(hidden, np.array([[0, 1]] * 4), np.full((4, 2), 0.5))
        print(f"layer {layer.layer} of {model.name}: {answer.shape} {answer.dtype}")


if __name__ == "__main__":
    main(*sys.argv[1:])
