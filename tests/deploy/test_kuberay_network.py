"""Who may reach whom in the Kubernetes manifests: every port that the code opens, from everybody who might try."""

import functools

from onebox.settings import Settings
from tests.deploy.manifests import Object, environment, of_kind, pods, python_output, render, variants
from tests.deploy.network import Network, Place

DOORS = range(31_100, 31_200)


@variants
def test_nothing_reaches_a_port_of_the_fleet_but_itself_and_what_it_must(
    overlay: str, components: tuple[str, ...]
) -> None:
    objects = render(overlay, components)
    network, places = _network(objects)
    for target in ("head", "engines"):
        for port in _fleet_ports():
            door = port == Settings().engine_port or port in DOORS
            reaching = {name for name, place in places.items() if network.allows(place, places[target], port)}
            wanted = {"head", "engines"} | ({"gateway"} if door else set())
            if port in {8265, Settings().engine_port}:
                wanted |= {"operator"}
            if "monitoring" in components and (port in {8080, 9101} or port in DOORS):
                wanted |= {"monitoring"}
            assert reaching == wanted, (target, port, reaching)


@variants
def test_stores_gateways_and_page_are_reached_by_their_users_alone(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    network, places = _network(objects)
    ingress = {"ingress"} if "ingress" in components else set()
    monitoring = {"monitoring"} if "monitoring" in components else set()
    wanted = {
        ("store", 6379): {"gateway"},
        ("fleet-store", 6379): {"head", "engines"},
        ("gateway", 8080): {"page"} | ingress | monitoring,
        ("page", 7860): ingress,
    }
    for (target, port), users in wanted.items():
        assert {name for name, place in places.items() if network.allows(place, places[target], port)} == users, target
        others = {22, 53, 80, 443, 6379, 7860, 8080, 8100, 8265, 10_001, 30_000} - {port}
        for other in others:
            reaching = {name for name, place in places.items() if network.allows(place, places[target], other)}
            # The example's one policy names both its ports for both its targets; nothing listens on the other.
            assert reaching <= ingress | monitoring, (target, other, reaching)


def test_pods_find_names_and_nothing_else_outside() -> None:
    objects = render("cpu", ("ingress", "monitoring"))
    network, places = _network(objects)
    for name in pods(objects):
        assert network.allows(places[name], places["dns"], 53, "UDP")
        for place in ("stranger", "operator", "ingress", "monitoring"):
            for port in (80, 8080, 8265):
                assert not network.allows(places[name], places[place], port), (name, place)


def _network(objects: tuple[Object, ...]) -> tuple[Network, dict[str, Place]]:
    """The policies, and all who may try: our pods, the operator, an ingress, Prometheus, DNS and a stranger."""
    places = {name: Place(pod.labels, "onebox") for name, pod in pods(objects).items()}

    def elsewhere(namespace: str, **labels: str) -> Place:
        return Place(labels, namespace, {"kubernetes.io/metadata.name": namespace})

    places["operator"] = Place(
        {"app.kubernetes.io/name": "kuberay-operator"},
        "kuberay-system",
        {"kubernetes.io/metadata.name": "kuberay-system"},
    )
    places["ingress"] = elsewhere("ingress-nginx")
    places["monitoring"] = elsewhere("monitoring")
    places["dns"] = elsewhere("kube-system")
    places["stranger"] = elsewhere("default")
    places["stray"] = Place({}, "onebox")  # a pod in our namespace that is none of ours
    return Network(of_kind(objects, "NetworkPolicy").values(), "onebox"), places


@functools.cache
def _fleet_ports() -> tuple[int, ...]:
    """A port of every kind that Ray, Serve, HAProxy and the replicas open, with the pods' own environment."""
    code = (
        "import ray._private.ray_constants as r, ray.serve._private.constants as s;"
        "print(r.DEFAULT_PORT, r.DEFAULT_DASHBOARD_PORT, r.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,"
        " s.DEFAULT_HTTP_PORT, s.DEFAULT_GRPC_PORT, s.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT,"
        " s.RAY_SERVE_FALLBACK_PROXY_GRPC_PORT, s.RAY_SERVE_HAPROXY_STATS_PORT, s.RAY_SERVE_HAPROXY_METRICS_PORT,"
        " s.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, s.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT,"
        " s.RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT, s.RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT)"
    )
    objects = render("cpu")
    variables = environment(objects, pods(objects)["engines"].spec["containers"][0])
    known = tuple(map(int, python_output(code, **variables).split()))
    replicas = set(range(known[-4], known[-3] + 1))
    assert not replicas & set(DOORS), "the ports that Serve gives replicas and the doors overlap"
    # Ray's client and metrics, workers' first and last, agents, and what the kernel draws.
    others = (10_001, 8080, 10_002, 19_999, 44_227, 40_000, 60_999)
    return (*known, *others, Settings().engine_port, DOORS[0], DOORS[-1], DOORS[0] - 1, DOORS[-1] + 1)
