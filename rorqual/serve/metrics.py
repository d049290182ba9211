"""What the server counts, for Prometheus, under vLLM's names: dashboards made for vLLM work as they are.

Three sources: the engines' own statistics, read when somebody asks (`_Engines`); the requests as they pass
(`Journey`), because times from the client's side include what happens before and after the engine; and HTTP
itself. Each server has a registry of its own: two in one process do not add up, and nothing is counted at
import. What vLLM does not have is called `rorqual:`.

A request that a stop string ended counts as `stop`, though the engine was told to abort it; `abort` is for
clients that left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rorqual.engine.api import Engine, FinishReason, Output

LABELS = ("model_name", "engine")
# Seconds; vLLM's, so that quantiles computed over both kinds of server mean the same.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
NEXT_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Metrics:
    """`engines` maps the names of models to the engines behind them."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(engines))

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", help_, LABELS, buckets=buckets, registry=self.registry)

        def counter(name: str, help_: str, *more: str) -> Counter:
            return Counter(f"vllm:{name}", help_, (*LABELS, *more), registry=self.registry)

        self.first_token_s = histogram("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_S)
        self.next_token_s = histogram("inter_token_latency_seconds", "Between outputs", NEXT_TOKEN_S)
        self.per_token_s = histogram(
            "request_time_per_output_token_seconds", "Mean time of a token after the first", NEXT_TOKEN_S
        )
        self.request_s = histogram("e2e_request_latency_seconds", "From arrival to the last token", REQUEST_S)
        self.queue_s = histogram("request_queue_time_seconds", "Waiting in the engine", REQUEST_S)
        self.prefill_s = histogram("request_prefill_time_seconds", "Reading the prompt", REQUEST_S)
        self.decode_s = histogram("request_decode_time_seconds", "Generating", REQUEST_S)
        self.prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.answer_length = histogram("request_generation_tokens", "Tokens of a completion", TOKENS)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts found in the prefix cache")
        self.new_tokens = counter("generation_tokens", "Tokens generated")
        self.ended = counter("request_success", "Requests ended, by reason", "finished_reason")
        self.http_requests = Counter(
            "http_requests", "HTTP requests", ("method", "handler", "status"), registry=self.registry
        )
        self.http_s = Histogram(
            "http_request_duration_seconds",
            "From a request's first byte to its response's last",
            ("method", "handler"),
            buckets=REQUEST_S,
            registry=self.registry,
        )

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) for what the scraper accepts."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def answered(self, method: str, handler: str, status: int, seconds: float) -> None:
        self.http_requests.labels(method, handler, str(status)).inc()
        self.http_s.labels(method, handler).observe(seconds)


class Journey:
    """One request's way through an engine; `end` exactly once."""

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._labels = (model, "0")
        self._next_token_s = metrics.next_token_s.labels(*self._labels)
        self._new_tokens = metrics.new_tokens.labels(*self._labels)
        self._began = time.monotonic()
        self._first_at = self._last_at = 0.0
        self._tokens = 0
        metrics.prompt_tokens.labels(*self._labels).inc(prompt_tokens)
        metrics.prompt_length.labels(*self._labels).observe(prompt_tokens)

    def read(self, output: Output) -> None:
        if output.token_ids:
            now = time.monotonic()
            if self._tokens:
                self._next_token_s.observe(now - self._last_at)
            else:
                self._first_at = now
                self._metrics.first_token_s.labels(*self._labels).observe(now - self._began)
                self._metrics.cached_tokens.labels(*self._labels).inc(output.cached_tokens)
            self._last_at = now
            self._tokens += len(output.token_ids)
            self._new_tokens.inc(len(output.token_ids))
        if output.stats is not None:
            self._metrics.queue_s.labels(*self._labels).observe(output.stats.queue_s)
            self._metrics.prefill_s.labels(*self._labels).observe(output.stats.prefill_s)
            self._metrics.decode_s.labels(*self._labels).observe(output.stats.decode_s)

    def end(self, reason: FinishReason) -> None:
        metrics = self._metrics
        metrics.ended.labels(*self._labels, str(reason)).inc()
        metrics.request_s.labels(*self._labels).observe(time.monotonic() - self._began)
        metrics.answer_length.labels(*self._labels).observe(self._tokens)
        if self._tokens > 1:
            metrics.per_token_s.labels(*self._labels).observe((self._last_at - self._first_at) / (self._tokens - 1))


class _Engines(Collector):
    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def describe(self) -> Iterable[Metric]:
        """Nothing: otherwise registering would read engines that have not started."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = {model: engine.stats for model, engine in self._engines.items()}

        def family(kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, help_: str, value: str) -> Metric:
            metric = kind(name, help_, labels=LABELS)
            for model, engine_stats in stats.items():
                metric.add_metric((model, "0"), getattr(engine_stats, value))
            return metric

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield family(gauge, "vllm:num_requests_running", "Requests being computed", "running")
        yield family(gauge, "vllm:num_requests_waiting", "Requests in the engine's queue", "waiting")
        yield family(gauge, "vllm:kv_cache_usage_perc", "Share of the latent cache in use, 0 to 1", "cache_usage")
        yield family(
            counter, "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "prompt_tokens"
        )
        yield family(counter, "vllm:prefix_cache_hits", "... and found there", "cache_hit_tokens")
        yield family(counter, "vllm:num_preemptions", "Requests put back into the queue", "preemptions")
        yield family(counter, "vllm:spec_decode_num_draft_tokens", "Tokens drafted", "draft_tokens")
        yield family(counter, "vllm:spec_decode_num_accepted_tokens", "... and accepted", "accepted")
        yield family(counter, "rorqual:disk_hit_tokens", "Prompt tokens read from the disk's cache", "disk_hit_tokens")
        yield family(counter, "rorqual:engine_steps", "Steps computed", "steps")
        yield family(counter, "rorqual:engine_restarts", "Engines started in the place of dead ones", "restarts")
