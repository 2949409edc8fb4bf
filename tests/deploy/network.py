"""Who may reach whom by a set of NetworkPolicies: their meaning, in a few lines, for pods that the tests name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Side = Literal["ingress", "egress"]
_PEERS = {"ingress": "from", "egress": "to"}


@dataclass(frozen=True, slots=True)
class Place:
    """A pod in a namespace, as policies see it."""

    labels: Mapping[str, str]
    namespace: str
    namespace_labels: Mapping[str, str] = field(default_factory=dict)


class Network:
    """The policies of one namespace. Pods elsewhere are held by no policy of ours."""

    def __init__(self, policies: Iterable[dict[str, Any]], namespace: str) -> None:
        self._policies = list(policies)
        self._namespace = namespace

    def allows(self, source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
        """Whether a connection may be made: both ends must agree."""
        leaves = self._side("egress", source, target, port, protocol)
        return leaves and self._side("ingress", target, source, port, protocol)

    def _side(self, side: Side, held: Place, peer: Place, port: int, protocol: str) -> bool:
        if held.namespace != self._namespace:
            return True
        holding = [
            policy["spec"]
            for policy in self._policies
            if side.capitalize() in policy["spec"]["policyTypes"]
            and _matches(policy["spec"]["podSelector"], held.labels)
        ]
        rules = [rule for spec in holding for rule in spec.get(side, [])]
        return not holding or any(self._fits(side, rule, peer, port, protocol) for rule in rules)

    def _fits(self, side: Side, rule: Mapping[str, Any], peer: Place, port: int, protocol: str) -> bool:
        ports: Sequence[Mapping[str, Any]] | None = rule.get("ports")
        if ports is not None and not any(_has(one, port, protocol) for one in ports):
            return False
        peers: Sequence[Mapping[str, Any]] | None = rule.get(_PEERS[side])
        return peers is None or any(self._is(one, peer) for one in peers)

    def _is(self, selector: Mapping[str, Any], peer: Place) -> bool:
        if "ipBlock" in selector:
            return False  # blocks of ours are the world outside the cluster
        if "namespaceSelector" in selector:
            if not _matches(selector["namespaceSelector"], peer.namespace_labels):
                return False
        elif peer.namespace != self._namespace:
            return False
        return "podSelector" not in selector or _matches(selector["podSelector"], peer.labels)


def _has(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    if rule["protocol"] != protocol:
        return False
    first = rule["port"]
    return bool(first <= port <= rule.get("endPort", first))


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "an operator that this reading of policies does not know"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True
