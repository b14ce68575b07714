"""Metrics for Prometheus by vLLM's names, which autoscalers and inference gateways read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engines.serving.generation import Generation
from engines.serving.session import Session

LABEL = "model_name"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Telemetry:
    """What a server counts. Labels are names of installed tenants, so their number is bounded."""

    def __init__(self, session: Session, prefix: str) -> None:
        """Make the metrics.

        Args:
            session: whose state the gauges show.
            prefix: what names begin with, such as ``vllm:``.
        """
        self.registry = CollectorRegistry()
        self.registry.register(_State(session, prefix))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(prefix + name, text, [LABEL, *labels], registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(prefix + name, text, [LABEL], buckets=SECONDS, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Instruction tokens read.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.success = counter("request_success", "Finished requests.", "finished_reason")
        self.first_token = seconds("time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens = seconds("inter_token_latency_seconds", "Between two tokens of a request.")
        self.whole = seconds("e2e_request_latency_seconds", "From a request to its end.")
        self.queued = seconds("request_queue_time_seconds", "From a request to its row.")

    def finished(self, model: str, generation: Generation, gaps: Sequence[float]) -> None:
        """Count a request that is over.

        Args:
            model: its tenant.
            generation: the request.
            gaps: seconds between its tokens.
        """
        times, answer = generation.times, generation.partial
        end = times.finished or time.monotonic()
        if times.started is not None:
            self.prompt_tokens.labels(model).inc(generation.num_prompt_tokens)
            self.queued.labels(model).observe(times.started - times.submitted)
        self.generation_tokens.labels(model).inc(len(answer.tokens))
        if times.first_token is not None:
            self.first_token.labels(model).observe(times.first_token - times.submitted)
        self.whole.labels(model).observe(end - times.submitted)
        between = self.between_tokens.labels(model)
        for gap in gaps:
            between.observe(gap)
        reason = {"eos": "stop", "cancelled": "abort", "": "abort"}.get(answer.finish_reason, answer.finish_reason)
        self.success.labels(model, reason).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges, and what the session counts itself, read when they are asked for."""

    def __init__(self, session: Session, prefix: str) -> None:
        self._session = session
        self._prefix = prefix

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """What they are now."""
        state = self._session.state()
        base = self._session.base or "base"
        installed = {*self._session.tenants, base}

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(self._prefix + name, text, labels=list(labels))

        running = gauge("num_requests_running", "Requests that have a row.", LABEL)
        waiting = gauge("num_requests_waiting", "Requests that wait for a row.", LABEL)
        for name in sorted(installed | state.tenants.keys()):
            tenant = state.tenants.get(name)
            running.add_metric([name], tenant.running if tenant else 0)
            waiting.add_metric([name], tenant.waiting if tenant else 0)
        yield from (running, waiting)
        cache = gauge("kv_cache_usage_perc", "Cache entries in use; 1 is all of them.", LABEL)
        cache.add_metric([base], state.cache_use)
        yield cache
        for name, text, count in (
            ("spec_decode_num_draft_tokens", "Drafted tokens that were verified.", state.drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that were right.", state.accepted_tokens),
        ):
            counted = CounterMetricFamily(self._prefix + name, text, labels=[LABEL])
            counted.add_metric([base], count)
            yield counted
        adapters = gauge("lora_requests_info", "Tenants that have requests.", "max_lora", *_ADAPTERS)
        names = [
            ",".join(sorted(name for name, tenant in state.tenants.items() if getattr(tenant, kind) and name != base))
            for kind in ("running", "waiting")
        ]
        most = self._session.manifest.ranges.tenants.max
        adapters.add_metric([str(most), *names], time.time())
        yield adapters


_ADAPTERS = ("running_lora_adapters", "waiting_lora_adapters")
