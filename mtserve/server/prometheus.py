"""Export of `Metrics` in the Prometheus text format over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mtserve.errors import InvalidArgument
from mtserve.metrics import Distribution, Family, Metrics

PREFIX = "mtserve_"


class MetricsCollector(Collector):
    """Reads `metrics` anew at each scrape; histograms get one bucket a power of two."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for family, values in self._metrics.families():
            if isinstance(values, Distribution):
                yield _histogram(family, values)
            else:
                yield _numbers(family, values)


def _numbers(family: Family, values: dict[str, float]) -> Metric:
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(PREFIX + family.name, family.help, labels=[family.label] if family.label else [])
    for label, value in values.items():
        metric.add_metric([label] if family.label else [], value)
    return metric


def _histogram(family: Family, values: Distribution) -> Metric:
    buckets = [(repr(bound), float(count)) for bound, count in values.cumulative()]
    buckets.append(("+Inf", float(values.count)))
    return HistogramMetricFamily(PREFIX + family.name, family.help, buckets=buckets, sum_value=values.sum)


class MetricsServer:
    """Serves /metrics on `host`:`port` from a thread. Raises InvalidArgument when it cannot listen there."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(MetricsCollector(metrics))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise InvalidArgument(f"cannot listen on {host}:{port}: {error.strerror}", field="metrics_port") from None

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
