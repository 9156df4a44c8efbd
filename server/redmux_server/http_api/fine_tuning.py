"""/v1/fine_tuning/jobs: adapters that are trained while the server answers."""

from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.http_api.answers import json_response
from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer
from redmux_server.http_api.paging import page_of
from redmux_server.http_api.schemas.fine_tuning import JobBody
from redmux_server.http_api.schemas.kept_answers import (
    Checkpoints,
    FineTuningJob,
    FineTuningJobs,
    JobEvents,
)
from redmux_server.http_api.validated import JsonRoute
from redmux_server.tuning.job import TuningJob

_PATH = "/v1/fine_tuning/jobs"
Limit = Annotated[int, Query(ge=1, le=1000)]
_METADATA = {
    "name": "metadata", "in": "query", "required": False, "style": "deepObject", "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    "description": "Jobs that have these pairs: metadata[key]=value.",
}  # fmt: skip


def router(offer: Offer) -> APIRouter:
    """Returns the routes of fine-tuning jobs."""
    router = APIRouter(route_class=JsonRoute, tags=["fine-tuning"])
    tuning = offer.desk.tuning

    def job_of(request: Request, job_id: str) -> TuningJob:
        return tuning.get(job_id, caller_of(request).tenant)

    @router.post(_PATH, response_model=FineTuningJob)
    async def create_fine_tuning_job(request: Request, body: JobBody) -> Response:
        """Trains an adapter on a file."""
        tenant = caller_of(request).tenant
        published = await offer.names.resolve(body.model, tenant)
        if published is not None:
            raise Refusal(
                f"model is {body.model[:128]!r}, an adapter: training starts from the base model "
                f"{offer.names.base!r}, and does not go on with adapters",
                param="model",
            )  # fmt: skip
        job = TuningJob(
            tenant, body.model, body.training_file, body.validation_file, body.suffix or "",
            body.chosen(), body.seed or 0, body.metadata or {},
        )  # fmt: skip
        return json_response(_told(await tuning.create(job)))

    @router.get(_PATH, response_model=FineTuningJobs, openapi_extra={"parameters": [_METADATA]})
    async def list_fine_tuning_jobs(
        request: Request, after: str | None = None, limit: Limit = 20
    ) -> Response:
        """Lists jobs, the newest first."""
        pairs = [(k, v) for k, v in request.query_params.multi_items() if k.startswith("metadata[")]
        found = [
            job for job in tuning.all_of(caller_of(request).tenant)
            if all(job.metadata.get(key[len("metadata[") : -1]) == value for key, value in pairs)
        ]  # fmt: skip
        return json_response(page_of(found, after, limit, _told))

    @router.get(f"{_PATH}/{{job_id}}", response_model=FineTuningJob)
    async def retrieve_fine_tuning_job(request: Request, job_id: str) -> Response:
        """Returns how far a job is."""
        return json_response(_told(job_of(request, job_id)))

    @router.post(f"{_PATH}/{{job_id}}/cancel", response_model=FineTuningJob)
    async def cancel_fine_tuning_job(request: Request, job_id: str) -> Response:
        """Ends a job."""
        return json_response(_told(await tuning.cancel(job_id, caller_of(request).tenant)))

    @router.get(f"{_PATH}/{{job_id}}/events", response_model=JobEvents)
    async def list_fine_tuning_events(
        request: Request, job_id: str, after: str | None = None, limit: Limit = 20
    ) -> Response:
        """Lists what has happened to a job, the newest first: messages, and metrics of steps."""
        events = [_Told(event) for event in reversed(job_of(request, job_id).events)]
        return json_response(page_of(events, after, limit, lambda event: event.fields))

    @router.get(f"{_PATH}/{{job_id}}/checkpoints", response_model=Checkpoints)
    async def list_fine_tuning_job_checkpoints(
        request: Request, job_id: str, after: str | None = None, limit: Limit = 10
    ) -> Response:
        """Lists the adapters that a job has made: the one that is its result."""
        job = job_of(request, job_id)
        made = [] if job.checkpoint is None else [_Told({
            "object": "fine_tuning.job.checkpoint", **job.checkpoint,
            "fine_tuned_model_checkpoint": job.fine_tuned_model, "fine_tuning_job_id": job.id,
        })]  # fmt: skip
        return json_response(page_of(made, after, limit, lambda checkpoint: checkpoint.fields))

    return router


class _Told(NamedTuple):
    """Something that is told as it is."""

    fields: dict[str, Any]

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.fields["id"])


def _told(job: TuningJob) -> dict[str, Any]:
    chosen = {
        name: "auto" if value is None else value
        for name, value in asdict(job.hyperparameters).items()
    }
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.model,
        "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "redmux",
        "result_files": job.result_files,
        "status": job.status,
        "validation_file": job.validation_file,
        "training_file": job.training_file,
        "hyperparameters": chosen,
        "trained_tokens": job.trained_tokens,
        "error": job.error,
        "user_provided_suffix": job.suffix or None,
        "seed": job.seed,
        "estimated_finish": None,
        "integrations": [],
        "metadata": job.metadata or None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
    }
