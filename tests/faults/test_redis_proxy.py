"""The proxy before the store: each of its faults, seen by the real client against the real server."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.store import prepare
from tests.agents.conftest import store_child
from tests.faults.redis_proxy import Command, RedisProxy, Trap
from tests.faults.resp import command_at, is_push, reply_end


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    folder = tmp_path_factory.mktemp("proxied")
    embedded = prepare(folder)
    child = store_child(embedded, folder)
    child.start()
    with closing(client_of(embedded.url)) as client:
        yield client
    child.stop()


@pytest.fixture
def proxy(direct: redis.Redis) -> Iterator[RedisProxy]:
    with RedisProxy(int(direct.connection_pool.connection_kwargs["port"])) as running:
        yield running
    direct.flushall()


@pytest.fixture
def client(direct: redis.Redis, proxy: RedisProxy) -> Iterator[redis.Redis]:
    password = direct.connection_pool.connection_kwargs["password"]
    with closing(client_of(f"redis://:{password}@127.0.0.1:{proxy.port}/0")) as through:
        yield through


@pytest.fixture
def hasty(direct: redis.Redis, proxy: RedisProxy) -> Iterator[redis.Redis]:
    """A client that does not wait long."""
    password = direct.connection_pool.connection_kwargs["password"]
    with closing(client_of(f"redis://:{password}@127.0.0.1:{proxy.port}/0", 0.5)) as through:
        yield through


def client_of(url: str, timeout_s: float = 10.0) -> redis.Redis:
    return redis.Redis.from_url(url, protocol=2, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def sets(command: Command) -> bool:
    return command.verb == "SET"


@pytest.mark.parametrize("cut", range(1, 33))
def test_a_command_ends_where_it_ends_however_it_is_cut(cut: int) -> None:
    raw = b"*2\r\n$3\r\nGET\r\n$12\r\nke\r\ny\r\n*2\r\n_\r\n"[:33]
    whole = b"*2\r\n$3\r\nGET\r\n$8\r\nke\r\ny\r\n*\r\n"
    assert command_at(whole, 0) == ([b"GET", b"ke\r\ny\r\n*"], len(whole))
    assert command_at(raw[:cut], 0) is None or cut == len(raw)


@pytest.mark.parametrize(
    "reply",
    [
        b"+OK\r\n",
        b":12\r\n",
        b"-ERR no\r\n",
        b"$-1\r\n",
        b"$0\r\n\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n*1\r\n$2\r\nok\r\n:7\r\n",
        b"%1\r\n+a\r\n*1\r\n_\r\n",
    ],
)
def test_a_reply_ends_where_it_ends_however_it_is_cut(reply: bytes) -> None:
    assert reply_end(reply + b"+next\r\n", 0) == len(reply)
    for cut in range(len(reply)):
        assert reply_end(reply[:cut], 0) is None


def test_what_a_server_publishes_is_no_reply() -> None:
    assert is_push(b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nx\r\n")
    assert not is_push(b"*1\r\n$1\r\nm\r\n")


def test_pipelines_and_published_messages_pass_unchanged(proxy: RedisProxy, client: redis.Redis) -> None:
    with client.pubsub() as listener, client.pipeline(transaction=True) as pipeline:
        listener.subscribe("a", "b")
        assert [listener.get_message(timeout=10)["channel"] for _ in range(2)] == [b"a", b"b"]
        for number in range(200):
            pipeline.rpush("list", f"{number}\r\n*1")
        pipeline.publish("b", b"\r\n$5\r\n")
        pipeline.execute()
        told = listener.get_message(timeout=10)
    assert told is not None
    assert told["data"] == b"\r\n$5\r\n"
    assert client.lrange("list", -1, -1) == [b"199\r\n*1"]
    assert proxy.counts["RPUSH"] == 200


def test_a_reply_dropped_after_the_commit_leaves_the_write_behind(
    proxy: RedisProxy, hasty: redis.Redis, direct: redis.Redis
) -> None:
    for fate in ("drop_reply", "lose_reply"):
        trap = proxy.trap(Trap(fate, sets))  # type: ignore[arg-type]  # one of the literals
        with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
            hasty.set(fate, "x")
        assert trap.sprung.is_set()
        assert direct.get(fate) == b"x"
        hasty.set("after", fate)
        assert direct.get("after") == fate.encode()


def test_a_command_dropped_before_the_store_leaves_nothing_behind(
    proxy: RedisProxy, client: redis.Redis, direct: redis.Redis
) -> None:
    proxy.trap(Trap("drop_before", sets, skip=1))
    client.set("first", "x")
    with pytest.raises(redis.ConnectionError):
        client.set("second", "x")
    assert direct.mget("first", "second") == [b"x", None]


def test_a_full_store_refuses_in_its_own_words(proxy: RedisProxy, client: redis.Redis, direct: redis.Redis) -> None:
    proxy.trap(Trap("oom", sets))
    with pytest.raises(redis.OutOfMemoryError):
        client.set("key", "x")
    assert direct.get("key") is None
    assert client.set("key", "y")


def test_a_held_link_delivers_late_even_what_its_sender_gave_up(
    proxy: RedisProxy, hasty: redis.Redis, direct: redis.Redis
) -> None:
    hasty.ping()
    proxy.set_link("held")
    with pytest.raises(redis.TimeoutError):
        hasty.set("late", "x")
    assert direct.get("late") is None
    proxy.set_link("up")
    arrived = threading.Event()
    for _ in range(200):
        if direct.get("late") == b"x":
            arrived.set()
            break
        arrived.wait(0.01)
    assert arrived.is_set()


def test_a_black_hole_takes_everything_and_its_connections_are_cut_at_its_end(
    proxy: RedisProxy, hasty: redis.Redis, direct: redis.Redis
) -> None:
    hasty.ping()
    proxy.set_link("blackhole")
    with pytest.raises(redis.TimeoutError):
        hasty.set("gone", "x")
    proxy.set_link("up")
    hasty.set("back", "x")
    assert direct.mget("gone", "back") == [None, b"x"]


def test_a_refused_link_cuts_and_accepts_nobody(proxy: RedisProxy, client: redis.Redis) -> None:
    client.ping()
    proxy.set_link("refused")
    with pytest.raises(redis.ConnectionError):
        client.ping()
    proxy.disarm()
    assert client.ping()


def test_a_crash_point_is_called_before_the_command_or_after_its_execution(
    proxy: RedisProxy, client: redis.Redis, direct: redis.Redis
) -> None:
    found: list[bytes | None] = []

    def look(command: Command) -> None:
        found.append(direct.get("key"))

    proxy.trap(Trap("drop_before", sets, then=look))
    proxy.trap(Trap("drop_reply", sets, then=look, where="after"))
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            client.set("key", "x")
    assert found == [None, b"x"]
