"""Two looks at Prometheus metrics and what lies between them: rates of counters, quantiles of histograms.

It is what Prometheus would compute from two scrapes, for a terminal that has no Prometheus.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from onebox.errors import SetupError

Labels = frozenset[tuple[str, str]]
PATHS = ("/metrics", "/metrics/engines")
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Scrape:
    """All series at one moment, `at` seconds of the monotonic clock."""

    at: float
    series: Mapping[str, Mapping[Labels, float]]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the series with these labels."""
        wanted = set(labels.items())
        return sum(value for given, value in self.series.get(name, {}).items() if wanted <= given)

    def values(self, name: str, label: str) -> list[str]:
        """What `label` is in the series of this name, in order."""
        return sorted({value for given in self.series.get(name, {}) for key, value in given if key == label})


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two scrapes."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Its length."""
        return max(1e-9, self.after.at - self.before.at)

    def gain(self, name: str, **labels: str) -> float:
        """By how much counters grew; one that fell has begun again."""
        wanted = set(labels.items())
        earlier = self.before.series.get(name, {})
        gain = 0.0
        for given, value in self.after.series.get(name, {}).items():
            if wanted <= given:
                was = earlier.get(given, 0.0)
                gain += value - was if value >= was else value
        return gain

    def rate(self, name: str, **labels: str) -> float:
        """The gain per second."""
        return self.gain(name, **labels) / self.seconds

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Below which value `share` of the window's observations lie, as PromQL's `histogram_quantile` has it.

        None where there was none.
        """
        buckets: defaultdict[float, float] = defaultdict(float)
        for le in self.after.values(f"{name}_bucket", "le"):
            buckets[float(le)] += self.gain(f"{name}_bucket", le=le, **labels)
        total = buckets.get(math.inf, 0.0)
        if total <= 0:
            return None
        rank, below, floor = share * total, 0.0, 0.0
        for bound, count in sorted(buckets.items()):
            if count >= rank:
                if math.isinf(bound):
                    return floor
                return floor + (bound - floor) * ((rank - below) / (count - below) if count > below else 1.0)
            below, floor = count, bound
        return floor


@dataclass(frozen=True, slots=True)
class Source:
    """A gateway to scrape."""

    url: str
    key: str | None = field(default=None, repr=False)

    def scrape(self) -> Scrape:
        """Its metrics and those of its engines now.

        Raises:
            SetupError: it does not answer, or is no Onebox.
        """
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            with httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S) as client:
                pages = [client.get(path).raise_for_status().text for path in PATHS]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SetupError(
                f"The API at {self.url} shows no metrics ({type(error).__name__}): it does not run there, or a proxy "
                "keeps them. Check the address and the key, or start it with python -m deploy up."
            ) from None
        scrape = Scrape(time.monotonic(), parse("".join(pages)))
        if not scrape.series.get("onebox_runs_running"):
            raise SetupError(f"What answers at {self.url} is no Onebox API. Give its address with --url.")
        return scrape


def parse(text: str) -> dict[str, dict[Labels, float]]:
    """The series of an exposition, by name and labels."""
    series: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series[sample.name][frozenset(sample.labels.items())] = sample.value
    return dict(series)
