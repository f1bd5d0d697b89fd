"""A run as Prometheus sees it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from unisono.errors import ConfigurationError
from unisono.training.callbacks import Callback

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge

    from unisono.training.step import StepResult
    from unisono.training.trainer import Trainer


class Prometheus(Callback):
    """Serves metrics of the run at ``http://ADDRESS:PORT/metrics``. *Local*: worker 0 does, from its first step or
    evaluation to its end.

    Args:
        port: Where to listen; 0: any free port (see the attribute).
        address: On which of this machine's addresses. Loopback by default; with ``"0.0.0.0"`` a Prometheus on another machine
            can read it.

    Raises:
        ConfigurationError: The ``prometheus_client`` package is missing, or ``port`` is no port; when it begins to serve, also:
            the port is taken.
    """

    edits_weights = False

    def __init__(self, port: int, *, address: str = "127.0.0.1") -> None:
        try:
            import prometheus_client  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"Prometheus metrics need the prometheus_client package ({error}). Install it: pip install 'unisono[prometheus]'"
            ) from error
        if not 0 <= port <= 65535:
            raise ConfigurationError(f"Prometheus(port={port}): a port is a number from 0 to 65535.")
        self.port = port
        """Where worker 0 listens; never 0 once it does."""
        self._address = address
        self._metrics: _Metrics | None = None

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Set what changed."""
        if trainer.collective.rank == 0:
            self._served().update(trainer, result)

    def on_evaluate(self, trainer: Trainer, results: Mapping[str, float]) -> None:
        """Set the results."""
        if trainer.collective.rank == 0:
            self._served().evaluated(trainer.position.step, results)

    def _served(self) -> _Metrics:
        if self._metrics is None:
            self._metrics = self._serve()
        return self._metrics

    def _serve(self) -> _Metrics:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()  # not the library's global one: a process may have several trainers
        metrics = _Metrics(registry)
        try:
            server, thread = start_http_server(self.port, addr=self._address, registry=registry)
        except OSError as error:
            raise ConfigurationError(
                f"Prometheus(port={self.port}): cannot listen at {self._address}:{self.port} ({error}). Choose another port, or "
                "0 for any free one."
            ) from error
        self.port = server.server_port

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        weakref.finalize(self, close)
        return metrics


class _Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"unisono_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"unisono_{name}", text, labels, registry=registry)

        self.step = gauge("step", "Optimizer steps done in the run")
        self.epoch = gauge("epoch", "Epoch, from 1")
        self.loss = gauge("loss", "Loss of the last step")
        self.norm = gauge("gradient_norm", "L2 norm of the gradient before clipping, in the last step")
        self.rate = gauge("samples_per_second", "Samples per second over about five seconds")
        self.workers = gauge("workers", "Workers that train now")
        self.learning_rate = gauge("learning_rate", "Learning rate in the last step", ("group",))
        self.evaluation = gauge("evaluation", "Result of the last evaluation that had this metric", ("metric",))
        self.evaluated_step = gauge("evaluation_step", "Optimizer steps done when this metric was evaluated", ("metric",))
        self.samples = counter("samples", "Samples trained in this start of the run")
        self.skipped = counter("skipped_steps", "Steps left out in this start of the run: loss or gradient were not finite")
        self.seconds = counter("seconds", "Seconds of worker 0 in this start of the run", ("phase",))

    def update(self, trainer: Trainer, result: StepResult) -> None:
        self.step.set(result.step)
        self.epoch.set(result.epoch + 1)
        self.loss.set(result.loss)
        self.norm.set(result.gradient_norm)
        self.rate.set(trainer.clock.rate)
        self.workers.set(trainer.collective.size)
        for group, rate in enumerate(result.learning_rates):
            self.learning_rate.labels(group).set(rate)
        self.samples.inc(result.samples)
        self.skipped.inc(int(result.skipped))
        phases = dict(trainer.clock.last)
        phases["other"] = max(0.0, phases.pop("step", 0.0) - sum(phases.values()))
        for name, value in phases.items():
            self.seconds.labels(name).inc(value)

    def evaluated(self, step: int, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            self.evaluation.labels(name).set(value)
            self.evaluated_step.labels(name).set(step)
