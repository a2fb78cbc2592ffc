"""The server on Ray Serve: a gateway that decodes and answers HTTP, and replicas of each model behind it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, Field
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from mowe_ray.config import load_evaluation
from mowe_ray.distributed import cluster
from mowe_ray.distributed.ray_data.batch_inference import local_copy
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.distributed.resources import check_resources
from mowe_ray.evaluation.targets import Target, find_models, folder_at
from mowe_ray.serving.app import Interface, Limits
from mowe_ray.serving.batching import Batcher
from mowe_ray.serving.decoding import Decoders
from mowe_ray.serving.examples import Example, examples_of
from mowe_ray.serving.question import Piece, Question, Refused, Reply
from mowe_ray.serving.served_model import ServedModel
from mowe_ray.training.clip_length import check_exported_clip_length
from mowe_ray.training.datasets import scan_validation

APPLICATION = "mowe_ray"
# oneDNN keeps what it compiled for each of the last 1,024 shapes, and batches of clips have a new shape nearly every
# time. Small blocks that live so long, between large ones that do not, cost a replica a gigabyte of holes within two
# minutes; with these settings it stays as it is after a few seconds (benchmarks/serving.py).
_MEMORY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
}
_DECODERS = 2
_EXAMPLES = 12
# A replica that is lost says so in several ways.
_LOST = (ActorDiedError, ActorUnavailableError, ReplicaUnavailableError, DeploymentUnavailableError)


@dataclass(frozen=True)
class Replicas:
    """What answers one model.

    Attributes:
        fewest, most: Replicas; between them Serve scales with the requests.
        cpus, gpus: Of each.
        max_batch_size: Questions that a replica answers together.
        batch_seconds: Audio that it takes together, in seconds.
        max_queued: Requests that wait for a replica; more are refused for now.
    """

    fewest: int = 1
    most: int = 1
    cpus: int = 1
    gpus: float = 0
    max_batch_size: int = 16
    batch_seconds: float = 240.0
    max_queued: int = 64

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of a deployment."""
        scaling: dict[str, Any] = {"num_replicas": self.fewest}
        if self.most > self.fewest:
            limits = {"min_replicas": self.fewest, "max_replicas": self.most}
            scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": self.max_batch_size}}
        return {
            "name": f"model-{name}",
            "ray_actor_options": {
                "num_cpus": self.cpus,
                "num_gpus": self.gpus,
                "runtime_env": {"env_vars": _MEMORY},
            },
            # Twice what is answered at a time: the next batch is there when one is done.
            "max_ongoing_requests": 2 * self.max_batch_size,
            "max_queued_requests": self.max_queued,
            "health_check_period_s": 2,
            **scaling,
        }


@dataclass(frozen=True)
class Door:
    """How the server is reached: address, token, and the names it answers for; None as for `Guards`."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    hosts: frozenset[str] | None = None


@dataclass(frozen=True)
class ServerPlan:
    """What is served: the models, how many replicas, and what a request may ask for."""

    models: Sequence[Target]
    replicas: Replicas
    limits: Limits
    door: Door


@serve.deployment
class ModelReplica:
    """A model in a process of its own, which answers batches."""

    def __init__(self, export: str, replicas: Replicas):
        if not replicas.gpus:
            torch.set_num_threads(replicas.cpus)
        model = ServedModel.load(local_copy(export), "cuda" if replicas.gpus else "cpu")
        self._batcher = Batcher(model, max_batch_size=replicas.max_batch_size, batch_seconds=replicas.batch_seconds)

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        """Yield the pieces of an answer, then the reply."""
        async for event in self._batcher.answer(question):
            yield event

    def check_health(self) -> None:
        """Fail once the thread of the model has ended, so that Serve starts another replica."""
        assert self._batcher.is_alive()


class RayBackend:
    """Asks the replicas of the models."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], members: Mapping[str, list[str]]):
        self._handles = {name: handle.options(method_name="answer", stream=True) for name, handle in handles.items()}
        self._members = dict(members)

    def models(self) -> dict[str, list[str]]:
        """Return the names of the pool members by model."""
        return self._members

    async def answer(self, model: str, question: Question) -> AsyncIterator[Piece | Reply]:
        """Yield the pieces of an answer, then the reply; asks again if a replica is lost before its first piece."""
        for is_last in (False, True):
            has_answered = False
            response = self._handles[model].remote(question)
            try:
                async for event in response:
                    has_answered = True
                    yield event
                return
            except BackPressureError as error:
                raise Refused(
                    "all replicas are busy: try again", status=503, code="overloaded", retry_after_s=2
                ) from error
            except RayTaskError as error:
                if isinstance(error.cause, Refused):
                    raise error.cause from None
                raise Refused(f"the model failed: {error.cause}", status=500, code="server_error") from error
            except _LOST as error:
                if has_answered or is_last:
                    message = "the replica that answered was lost: ask again"
                    raise Refused(message, status=503, code="replica_lost", retry_after_s=5) from error
            finally:
                response.cancel()  # of one that is complete: nothing
            await asyncio.sleep(0.2)


@serve.deployment
@serve.ingress()
class Gateway:
    """The process of the HTTP server."""

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        members: dict[str, list[str]],
        limits: Limits,
        door: Door,
        examples: list[Example],
    ):
        self._backend, self._limits, self._door = RayBackend(handles, members), limits, door
        self._examples = examples

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Serve calls it."""
        interface = Interface(self._backend, Decoders(_DECODERS), self._limits, self._examples)
        return interface.app(self._door.token, self._door.hosts)


def application(plan: ServerPlan, examples: Sequence[Example] = ()) -> serve.Application:
    """Return what Serve runs."""
    replicas = plan.replicas
    handles = {
        target.name: ModelReplica.options(  # type: ignore[attr-defined]
            **replicas.options(target.name)
        ).bind(target.export, replicas)
        for target in plan.models
    }
    return Gateway.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=plan.limits.max_in_flight + 16,  # those beyond are told so
    ).bind(handles, {t.name: _members(t) for t in plan.models}, plan.limits, plan.door, list(examples))


def start(plan: ServerPlan, log: Callable[[str], None]) -> None:
    """Start the server, and return once it answers.

    Raises:
        ValueError: Something the user must change: a model, a port, the resources.
    """
    for target in plan.models:
        export = folder_at(target.export).read_json("config.json")
        check_exported_clip_length(export, plan.limits.max_audio_s, "--max-audio-s")
    replicas, models = plan.replicas, len(plan.models)
    need = {"CPU": 1.0 + models * replicas.fewest * replicas.cpus, "GPU": models * replicas.fewest * replicas.gpus}
    cluster.join(1 + models * replicas.most * replicas.cpus, log)
    if waits := check_resources(need):
        log(waits)
    door = plan.door
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: what it says is for Serve's own users
    try:
        serve.start(http_options=HTTPOptions(host=door.host, port=door.port), proxy_location="HeadOnly")
        serve.run(
            application(plan, _examples(plan.models[0])), name=APPLICATION, route_prefix="/", logging_config=quiet
        )
    except (ActorDiedError, TimeoutError) as error:
        raise ValueError("the server did not start: Ray Serve's proxy does not answer; is the machine busy?") from error
    except RuntimeError as error:
        raise ValueError(f"the server did not start: {error}") from error


def stop() -> None:
    """End the server, and Serve with it where nothing else runs on a cluster; a local Ray ends with this process."""
    serve.delete(APPLICATION)
    # Its call dies with the controller that it ends, and Ray prints that it failed: only where it is needed.
    if "RAY_ADDRESS" in os.environ and not serve.status().applications:
        serve.shutdown()


def is_running() -> bool:
    """Whether the server has not failed for good."""
    found = serve.status().applications.get(APPLICATION)
    return found is not None and found.status not in ("DEPLOY_FAILED", "NOT_STARTED")


class ServiceArguments(BaseModel, extra="forbid"):
    """Arguments of the application in the configuration of a RayService."""

    models: list[str] = Field(min_length=1)
    replicas: list[int] = Field([1, 1], min_length=2, max_length=2)
    cpus: int = 1
    gpus: float = 0
    token_file: str | None = None


def service(arguments: ServiceArguments) -> serve.Application:
    """Return the application of `cluster/kuberay-service.yaml`."""
    token = None
    if arguments.token_file is not None:
        with open(arguments.token_file, encoding="utf-8") as file:  # noqa: PTH123 - a mounted secret
            token = file.read().strip()
    fewest, most = arguments.replicas
    plan = ServerPlan(
        find_models(arguments.models),
        Replicas(fewest, most, arguments.cpus, arguments.gpus),
        Limits(),
        Door(token=token),
    )
    return application(plan)


def _members(target: Target) -> list[str]:
    return [spec["name"] for spec in folder_at(target.export).read_json("config.json").get("weak_encoders") or []]


def _examples(target: Target) -> list[Example]:
    """Return clips of the run's validation sets."""
    config = load_evaluation(target.config)
    indexes = scan_validation(config.data, parallel_map) if target.config is not None else {}
    limits = (config.data.min_duration_s, config.generation.max_audio_s)
    return [example for index in indexes.values() for example in examples_of(index, _EXAMPLES, *limits)][:_EXAMPLES]
