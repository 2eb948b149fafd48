"""Instruments alone, then every counter of the server under a scripted sequence."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from mtserve.errors import InvalidArgument, NotFound
from mtserve.metrics import FAMILIES, Metrics
from mtserve.server.client import Client, ScoreCall
from mtserve.server.prometheus import MetricsServer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_counters_gauges_and_labels() -> None:
    metrics = Metrics()
    metrics.count("requests_total")
    metrics.count("prefix_tokens_total", 512, "gpu")
    metrics.count("prefix_tokens_total", 8, "encoded")
    metrics.count("requests_in_flight", 3)
    metrics.count("requests_in_flight", -1)
    metrics.set("queue_length", 7)
    found = metrics.snapshot()
    assert found["requests_total"] == 1
    assert found["prefix_tokens_total"] == {"gpu": 512, "host": 0, "encoded": 8}
    assert (found["requests_in_flight"], found["queue_length"]) == (2, 7)
    assert set(found) == set(FAMILIES)
    json.dumps(found)


@pytest.mark.parametrize(("name", "label"), [("nothing", ""), ("requests_total", "gpu"), ("rejected_total", "whim")])
def test_what_is_not_declared_is_our_bug(name: str, label: str) -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.count(name, 1, label)
    with pytest.raises(KeyError):
        metrics.set(name, 1, label)
    with pytest.raises(KeyError):
        metrics.observe(name, 1)


def test_many_at_once_are_as_many_one_by_one() -> None:
    at_once, one_by_one = Metrics(), Metrics()
    amounts = [("candidates_total", 7, ""), ("prefix_tokens_total", 3, "gpu"), ("candidates_total", 2, "")]
    values = [0.0, 2.0**-30, 0.004, 0.004, 1.0, 2.0**12]
    at_once.count_many(amounts)
    for batch in (values, [], [0.25]):
        at_once.observe_many("request_seconds", batch)
    for name, amount, label in amounts:
        one_by_one.count(name, amount, label)
    for value in (*values, 0.25):
        one_by_one.observe("request_seconds", value)
    assert at_once.snapshot() == one_by_one.snapshot()
    assert at_once.distribution("request_seconds").buckets == one_by_one.distribution("request_seconds").buckets
    assert at_once.value("candidates_total") == 9
    for undeclared in ("nothing", "requests_total"):
        with pytest.raises(KeyError):
            at_once.count_many([(undeclared, 1, "gpu")])


def test_quantiles_are_within_one_percent() -> None:
    metrics = Metrics()
    values = np.random.default_rng(0).lognormal(-5, 1.5, 5001)
    for value in values:
        metrics.observe("request_seconds", value)
    found = metrics.distribution("request_seconds")
    assert (found.count, found.max) == (5001, values.max())
    assert found.sum == pytest.approx(values.sum())
    for share in (0.001, 0.5, 0.95, 0.99, 1.0):
        assert found.quantile(share) == pytest.approx(np.quantile(values, share, method="inverted_cdf"), rel=0.0101)


def test_ends_of_the_histogram_lose_nothing() -> None:
    metrics = Metrics()
    for value in (0.0, 1e-12, 2.0**-20, 2.0**8, 1e9):
        metrics.observe("request_seconds", value)
    found = metrics.distribution("request_seconds")
    points = dict(found.cumulative())
    assert (points[2.0**-20], points[2.0**7], points[2.0**8], found.count) == (3, 3, 4, 5)
    assert Metrics().distribution("request_seconds").quantile(0.5) == 0
    with pytest.raises(ValueError, match="outside 0 to 1"):
        found.quantile(1.5)


def test_powers_of_two_fall_into_their_own_bucket() -> None:
    metrics = Metrics()
    for exponent in range(25):
        metrics.observe("batch_tokens", 2**exponent)
    counts = [count for _, count in metrics.distribution("batch_tokens").cumulative()]
    assert counts == list(range(1, 26))


def test_threads_lose_no_update() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(5000):
            metrics.count("requests_total")
            metrics.observe("batch_tokens", 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("requests_total") == 20_000
    assert metrics.distribution("batch_tokens").count == 20_000


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        text = page.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(f"|{k}={v}" for k, v in sample.labels.items()): sample.value for sample in samples}


def test_prometheus_shows_each_family() -> None:
    metrics = Metrics()
    metrics.count("evicted_pages_total", 5, "host")
    metrics.set("queue_length", 2)
    for value in (1, 2, 3, 4, 5):
        metrics.observe("batch_requests", value)
    with MetricsServer(metrics, "127.0.0.1", free_port()) as server:
        found = scrape(server.port)
    assert found["mtserve_evicted_pages_total|tier=host"] == 5
    assert found["mtserve_evicted_pages_total|tier=gpu"] == 0
    assert found["mtserve_queue_length"] == 2
    bounds = {
        name.split("le=")[1]: count for name, count in found.items() if name.startswith("mtserve_batch_requests_b")
    }
    assert (bounds["1.0"], bounds["2.0"], bounds["4.0"], bounds["8.0"], bounds["+Inf"]) == (1, 2, 4, 5, 5)
    assert (found["mtserve_batch_requests_count"], found["mtserve_batch_requests_sum"]) == (5, 15)


def test_a_scripted_sequence_moves_every_counter_of_the_server(engine: FakeEngine, serve: Any) -> None:
    port = free_port()
    with Client(serve(engine, metrics_port=port).target) as client:
        client.append("ann", {"time_ms": [1]})
        client.score("ann", {"item": [1]})
        with pytest.raises(NotFound):
            client.score("bob", {"item": [1]})
        with pytest.raises(InvalidArgument):
            client.score("ann", {"colour": [1]})
        client.score_batch([ScoreCall("ann", {"item": [1]}), ScoreCall("bob", {"item": [1]})])
        found = scrape(port)
    answers = {name.split("code=")[1]: value for name, value in found.items() if "answers_total" in name and value}
    assert answers == {"OK": 4, "NOT_FOUND": 2, "INVALID_ARGUMENT": 1}


def test_a_taken_metrics_port_is_a_clear_error() -> None:
    with MetricsServer(Metrics(), "127.0.0.1", free_port()) as server:
        message = f"metrics_port: cannot listen on 127.0.0.1:{server.port}: Address already in use"
        with pytest.raises(InvalidArgument, match=message):
            MetricsServer(Metrics(), "127.0.0.1", server.port)
