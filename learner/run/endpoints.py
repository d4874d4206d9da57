"""The pages that a learner serves over HTTP, and the command it takes there."""

from typing import Any

from learner.records import Control, Endpoints
from learner.run.connections import Connections
from learner.run.metrics import StateCollector
from learner.run.parts import Parts
from learner.run.reports import status_report
from protocol.errors import ConfigError
from protocol.observability import ObservabilityServer


class EndpointServer:
    """Serves until `close`; where, is in the run folder.

    | page       | what it gives                                             |
    |------------|-----------------------------------------------------------|
    | /metrics   | what `learner.run.metrics` exports, for Prometheus        |
    | /healthz   | the age of each loop's last progress                      |
    | /readyz    | whether actors can join                                   |
    | /status    | `learner.run.reports.status_report`, for displays         |
    | /sd        | the live actors' metrics, for Prometheus to find          |
    | /rewards   | POST: change weights and conditions of rewards            |
    """

    def __init__(self, parts: Parts, connections: Connections) -> None:
        """Raises `ConfigError` if the port is taken."""
        self._parts = parts
        parts.registry.register(StateCollector(parts, connections))
        self._server = ObservabilityServer(
            parts.registry,
            host=parts.config.endpoints.metrics_host,
            port=parts.config.endpoints.metrics_port,
            heartbeats=(parts.heartbeat, connections.heartbeat),
            ready=lambda: parts.progress.phase != "loading",
            routes={
                "/status": lambda: status_report(parts, connections).model_dump(),
                "/sd": self._service_discovery,
            },
            commands={"/rewards": self._change_rewards},
        )
        self.metrics_url = f"http://{self._server.address}/metrics"
        parts.folder.write_control(Control(url=self._server.command_url, token=self._server.token))
        parts.folder.write_endpoints(Endpoints(learner=connections.url, metrics=self.metrics_url))

    def close(self) -> None:
        """Serve nothing any more."""
        self._server.close()

    def _change_rewards(self, updates: Any) -> dict[str, Any]:
        """Take a command from outside, on a thread of the server."""
        if cause := self._parts.progress.interrupted:
            raise ConfigError(f"the run is ending: {cause}")
        return self._parts.rewards.command(updates)

    def _service_discovery(self) -> list[dict[str, Any]]:
        """Prometheus HTTP service discovery: the live actors' metrics endpoints."""
        return [
            {
                "targets": [f"{actor.hello.metrics_host}:{actor.hello.metrics_port}"],
                "labels": {"actor": str(actor.number), "run": self._parts.folder.path.name},
            }
            for actor in self._parts.coordinator.actors()
            if actor.hello.metrics_port
        ]
