"""Figures of a server, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mowe_ray.serving.question import Reply

# Other paths count as one: clients can invent any.
_PATHS = frozenset(("/", "/v1/chat/completions", "/v1/audio/transcriptions", "/v1/models", "/health"))


class Metrics:
    """Counts requests and answers of one process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("mowe_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self._seconds = Histogram("mowe_request_seconds", "Time of a request, in seconds", ["path"], registry=registry)
        self._audio = Counter("mowe_audio_seconds", "Audio that was answered, in seconds", ["model"], registry=registry)
        self._tokens = Counter("mowe_completion_tokens", "Tokens of answers", ["model"], registry=registry)
        self._batch = Histogram(
            "mowe_batch_size", "Questions answered together", ["model"], buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self._ran = Counter("mowe_encoder_clips", "Clips an encoder ran for", ["model", "encoder"], registry=registry)
        self.in_flight = Gauge("mowe_requests_in_flight", "Requests that are being answered", registry=registry)

    def request(self, path: str, status: int, seconds: float | None = None) -> None:
        """Count a request that is over."""
        path = path if path in _PATHS else "other"
        self._requests.labels(path, str(status)).inc()
        if seconds is not None:
            self._seconds.labels(path).observe(seconds)

    def answered(self, model: str, reply: Reply) -> None:
        """Count an answer."""
        self._audio.labels(model).inc(sum(clip.seconds for clip in reply.clips))
        self._tokens.labels(model).inc(reply.completion_tokens)
        self._batch.labels(model).observe(reply.batch_size)
        for clip in reply.clips:
            for encoder in clip.ran:
                self._ran.labels(model, encoder).inc()

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)
