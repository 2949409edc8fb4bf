"""What an operator sees of a whole product: `top`, the metrics of all workers and of Serve's replicas, their logs."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.scrape import Source
from onebox.sockets import free_port
from tests.e2e.test_up import ask, deploy
from tests.product import Product


@contextmanager
def traffic(product: Product) -> Iterator[None]:
    """Replies one after another while the block runs."""
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            ask(product, "hello")

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_top_shows_fleet_queue_and_replies_of_the_instance_at_home(scripted_product: Product) -> None:
    with traffic(scripted_product):
        done = deploy("top", "--once", "--interval-s", "2", ONEBOX_HOME=str(scripted_product.home), COLUMNS="160")
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines() if line.strip()}
    assert re.search(r"replicas +1\b", rows["replicas"])
    assert float(rows["tokens"].split()[-1]) > 0
    assert re.search(r"[\d.]+ m?s / [\d.]+ m?s / [\d.]+ m?s", rows["first token p50 / p95 / p99"])
    assert re.search(r"chat +[1-9][\d.]* ", rows["chat"])
    (replica,) = (line for line in done.stdout.splitlines() if re.match(r"127\.0\.0\.1:\d+ ", line))
    assert "scripted" in replica


def test_top_says_in_one_line_that_nobody_answers() -> None:
    done = deploy("top", "--once", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "shows no metrics" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_any_worker_answers_for_both(scripted_product: Product) -> None:
    source = Source(scripted_product.api_url)
    before = source.scrape().sum("onebox_runs_ended_total")
    for _ in range(8):
        assert ask(scripted_product, "hello").status_code == 200
    time.sleep(0.1)
    seen = {source.scrape().sum("onebox_runs_ended_total") for _ in range(12)}
    assert seen == {before + 8}


def test_a_replica_of_serve_logs_to_a_file_of_its_own(scripted_product: Product) -> None:
    assert list((scripted_product.home / "logs" / "engine").glob("replica-*.log"))
