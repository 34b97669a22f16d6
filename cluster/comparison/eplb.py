"""The expert-parallel load balancer (EPLB) of DeepSeek-V3, for comparison.

Our own implementation of the global rule in the DeepSeek-V3 technical report (section 3.4.2) and in
the README of DeepSeek's EPLB. The spare replicas go one by one to the expert with the largest load
per replica. Then the replicas, the heaviest first, go each to the least loaded host with a free
slot. Traffic is split evenly over the replicas of an expert. The previous placement does not
matter, and an expert may stand twice on one host.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

import heapq

import numpy as np


def eplb(load_E: np.ndarray, hosts: int, slots: int) -> np.ndarray:
    """Return copies_EH: how many replicas of each expert stand on each host.

    There are ``hosts`` hosts, each with ``slots``. Raises ValueError if the experts do not fit.
    """
    experts = len(load_E)
    if hosts * slots < experts:
        raise ValueError(f"slots: {hosts} hosts with {slots} are too few for {experts} experts")
    replicas_E = np.ones(experts, dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(hosts * slots - experts):
        _, expert = heapq.heappop(heap)
        replicas_E[expert] += 1
        heapq.heappush(heap, (-float(load_E[expert]) / float(replicas_E[expert]), expert))
    per_replica_E = load_E / replicas_E
    copies_EH = np.zeros((experts, hosts), dtype=np.int64)
    least = [(0.0, host) for host in range(hosts)]
    taken_H = np.zeros(hosts, dtype=np.int64)
    for expert in np.repeat(np.arange(experts), replicas_E)[
        np.argsort(-np.repeat(per_replica_E, replicas_E), kind="stable")
    ]:
        load, host = heapq.heappop(least)
        copies_EH[expert, host] += 1
        taken_H[host] += 1
        if taken_H[host] < slots:
            heapq.heappush(least, (load + float(per_replica_E[expert]), host))
    return copies_EH


def eplb_host_load(copies_EH: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Return each host's load, (H,), if every expert's is split evenly over its replicas."""
    return (load_E / copies_EH.sum(axis=1)) @ copies_EH


def changed_slots(before_EH: np.ndarray, after_EH: np.ndarray) -> int:
    """Return how many slots get other weights than they had."""
    return int(np.maximum(after_EH - before_EH, 0).sum())
