"""Load balance, by estimated cost: which data-parallel rank gets which rollout, and in which order
a pipeline takes its microbatches."""

from __future__ import annotations

import bisect
import heapq

import numpy as np

from ovr_fast.errors import OVRFastError


class TooFewRollouts(OVRFastError, ValueError):
    """A rank would get no rollout of a minibatch."""


def greedy_partition(costs: list[float] | list[int], ranks: int) -> list[list[int]]:
    """Longest processing time first (Graham 1969): in order of falling cost, each item to the rank
    with the least load so far.

    Deterministic in ``costs``; a rank gets nothing where there are fewer items than ranks.

    Returns:
        ``[rank]`` lists of indices, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def rebalance(shares: list[list[int]], costs: list[float], *, tolerance: float = 0.005) -> None:
    """Move single items from the most to the least loaded rank, in place, until the largest load is
    within ``tolerance`` of the mean or no move helps. A rank without items gets one if any rank has
    two."""
    for share in shares:
        largest = max(shares, key=len)
        if not share and len(largest) > 1:
            cheapest = min(largest, key=lambda i: (costs[i], i))
            largest.remove(cheapest)
            share.append(cheapest)
    loads = [sum(costs[index] for index in share) for share in shares]
    mean = sum(loads) / len(loads)
    while True:
        most = max(range(len(loads)), key=lambda rank: (loads[rank], -rank))
        least = min(range(len(loads)), key=lambda rank: (loads[rank], rank))
        gap = loads[most] - loads[least]
        # Moving any cost under the gap narrows it, half of the gap closes it.
        movable = [index for index in shares[most] if costs[index] < gap]
        if loads[most] <= mean * (1 + tolerance) or not movable or len(shares[most]) == 1:
            return
        index = min(movable, key=lambda i: (abs(costs[i] - gap / 2), i))
        shares[most].remove(index)
        bisect.insort(shares[least], index)
        loads[most] -= costs[index]
        loads[least] += costs[index]


def load_imbalance(shares: list[list[int]], costs: list[float]) -> float:
    """Largest load over the mean, minus 1: the share of its time that an average rank waits."""
    loads = [sum(costs[index] for index in share) for share in shares]
    return max(loads) * len(loads) / sum(loads) - 1.0


def pipeline_time(costs: list[float], stages: int) -> float:
    """Time of an update by one-forward-one-backward (Narayanan et al. 2021, figure 4), where a
    microbatch takes its cost on each stage, and twice that backward. Without stages that wait for
    each other it is 3 times the sum of the costs.

    Args:
        costs: of the microbatches, in their order.
        stages: of the pipeline.
    """
    count = len(costs)
    orders = []
    for stage in range(stages):
        first = min(stages - 1 - stage, count)
        order = [("forward", i) for i in range(first)]
        for i in range(count - first):
            order += [("forward", first + i), ("backward", i)]
        orders.append(order + [("backward", i) for i in range(count - first, count)])
    ended: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    while any(places[stage] < len(orders[stage]) for stage in range(stages)):
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                kind, i = order[places[stage]]
                before = stage - 1 if kind == "forward" else stage + 1
                if 0 <= before < stages and (kind, before, i) not in ended:
                    break
                begins = max(clocks[stage], ended.get((kind, before, i), 0.0))
                clocks[stage] = begins + costs[i] * (1 if kind == "forward" else 2)
                ended[kind, stage, i] = clocks[stage]
                places[stage] += 1
    return max(clocks)


def pipeline_order(costs: list[float], stages: int) -> list[int]:
    """The order of microbatches of which a pipeline is done first: as they are, by rising or
    falling cost, or with the cheap ones at both ends, where stages wait for each other."""
    rising = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    orders = [list(range(len(costs))), rising, rising[::-1], rising[::2] + rising[1::2][::-1]]
    return min(orders, key=lambda order: pipeline_time([costs[i] for i in order], stages))


def split_minibatches(
    costs: list[float],
    groups: list[int],
    *,
    count: int,
    ranks: int,
    seed: tuple[int, int],
    affinity: list[int] | None = None,
) -> list[list[list[int]]]:
    """Cut a rollout batch into minibatches and each minibatch into data-parallel shares.

    Rollouts of one group stay in one minibatch. Which groups form a minibatch depends on the seed
    alone, not on the number of ranks, so another layout trains on the same minibatches. Rollouts of
    equal affinity start on one rank, so that few replicas encode an image; single ones then move
    until the loads are even.

    Args:
        costs: estimated FLOPs of each rollout.
        groups: group id of each rollout.
        count: minibatches.
        ranks: data-parallel ranks.
        seed: decides the minibatches.
        affinity: group id of rollouts to co-locate, such as the prompt's number; None: none.

    Returns:
        ``[minibatch][rank]`` lists of indices.

    Raises:
        TooFewRollouts: a rank would get no rollout of a minibatch.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(costs) < count * ranks or len(members) < count:
        raise TooFewRollouts(
            f"{len(costs)} rollouts a step are too few for {count} minibatches on {ranks} "
            "data-parallel ranks; raise rl.prompts_per_step or lower rl.critic_steps (without a "
            "critic rl.policy_steps)"
        )
    co_located = affinity or list(range(len(costs)))
    group_costs: dict[int, float] = {}
    for index, key in enumerate(co_located):
        group_costs[key] = group_costs.get(key, 0.0) + costs[index]
    keys = list(group_costs)
    partition = greedy_partition(list(group_costs.values()), ranks)
    rank_of = {keys[i]: rank for rank, share in enumerate(partition) for i in share}
    names = list(members)
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    minibatches = []
    for number in range(count):
        chosen = sorted(index for place in order[number::count] for index in members[names[place]])
        shares: list[list[int]] = [[] for _ in range(ranks)]
        for index in chosen:
            shares[rank_of[co_located[index]]].append(index)
        rebalance(shares, costs)
        if not all(shares):
            raise TooFewRollouts(
                f"a minibatch of {len(chosen)} rollouts leaves one of {ranks} data-parallel ranks "
                "without any; raise rl.prompts_per_step or lower rl.critic_steps (without a critic "
                "rl.policy_steps)"
            )
        minibatches.append(shares)
    return minibatches
