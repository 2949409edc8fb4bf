"""How many replicas a fleet should have: the policy Ray Serve's controller asks ten times a second.

It goes by what the replicas themselves report: requests running, waiting and begun, runs that are queued at gateways
for a place, and use of the KV cache. Serve's own request counters play no part: they miss what comes by a replica's
door, and stay up after streams have ended (ray#61551). Serve adds the bounds and the delays; it pickles this module by
value, so it imports nothing of ours.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

METRICS_INTERVAL_S: Final = 1.0  # between two reports of a replica
LOOK_BACK_S: Final = 2.0  # of reports that are averaged
FULL: Final = 0.8  # above this share of its places or KV cache in use, a fleet grows
SPARE: Final = 0.6  # it shrinks when what is left would be used no more than this


class LoadPolicy:
    """Called with Serve's `AutoscalingContext`. `places` are the requests one replica works on at a time."""

    def __init__(self, places: int) -> None:
        self._places = places

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted, and no state."""
        running = context.current_num_replicas
        if running == 0:  # Serve itself wakes a fleet of none when a request comes
            return context.target_num_replicas, {}
        reported: Mapping[str, Mapping[object, float]] = context.aggregated_metrics or {}
        if "begun" not in reported:  # nobody has told yet
            return context.target_num_replicas, {}
        begun, at_work, waiting, queued, caches = (
            sum(reported.get(name, {}).values()) for name in ("begun", "running", "waiting", "queued", "kv_use")
        )
        if not begun and not at_work and not queued:
            return 0, {}
        return wanted(running, (at_work + waiting + queued) / self._places, caches), {}


def wanted(replicas: int, work: float, caches: float) -> int:
    """Replicas for `work` replicas' places and `caches` replicas' KV caches in use; at least one."""
    use = max(work, caches)
    if (more := math.ceil(use / FULL)) > replicas:
        return more
    return min(replicas, max(1, math.ceil(use / SPARE)))
