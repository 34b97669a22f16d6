"""Give an expert one replica more if a host is left for it, wait until it stands, and undo it.

python examples/operate.py [NAME]
"""

from __future__ import annotations

import sys

import moesaic


def main(name: str = "local") -> None:
    cluster = moesaic.connect(name)
    expert = cluster.experts()[0]
    place = expert.model, expert.layer, expert.expert
    before = [replica.host for replica in expert.replicas]
    print(f"layer {place[1]}, expert {place[2]} of {place[0]}: on {', '.join(before)}")

    most = len(cluster.status().hosts)
    change = cluster.wait_for(cluster.replicate(*place, min(len(before) + 1, most)))
    print(f"change {change.id}: {change.total_moves} moves, {change.phase}")
    for problem in change.errors:
        print(f"  {problem}")

    cluster.wait_for(cluster.replicate(*place, 1))
    print("the constraint is revoked; the balancer decides again")


if __name__ == "__main__":
    main(*sys.argv[1:])
