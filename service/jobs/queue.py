"""The queue of jobs as the service sees it: hand in, look at, cancel, try again, follow."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from dbos import DBOSClient, WorkflowStatus, error
from sqlalchemy import URL

from db.rows.job_ends import JobOutcome
from service.jobs.job import Job, JobSpec, JobStatus
from service.jobs.store import APP, LOG, VERSION, WORKFLOW, open_client

_STATUS = {
    "ENQUEUED": JobStatus.QUEUED,
    "DELAYED": JobStatus.QUEUED,
    "PENDING": JobStatus.RUNNING,
    "CANCELLED": JobStatus.CANCELLED,
    "ERROR": JobStatus.FAILED,
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": JobStatus.FAILED,
}
_LIVE = tuple(word for word, status in _STATUS.items() if not status.is_over)
_MOST_BATCHES = 200


class JobQueue:
    """Jobs of one database."""

    def __init__(self, url: URL) -> None:
        self._client: DBOSClient = open_client(url)

    def submit(self, spec: JobSpec, hardware: str) -> Job:
        """Queue a job for the hardware of a key."""
        job_id = uuid.uuid4().hex
        self._client.enqueue(
            {"queue_name": hardware, "workflow_name": WORKFLOW, "workflow_id": job_id, "app_version": VERSION},
            spec.to_json(),
        )
        job = self.find(job_id)
        assert job is not None
        return job

    def find(self, job_id: str) -> Job | None:
        """The job of an id, None when there is none."""
        found = self._client.list_workflows(workflow_ids=[job_id], name=WORKFLOW)
        return _job(found[0]) if found else None

    def page(self, *, limit: int, offset: int = 0) -> list[Job]:
        """Jobs, newest first, without their results."""
        found = self._client.list_workflows(
            name=WORKFLOW, application_name=APP, sort_desc=True, limit=limit, offset=offset
        )
        return [replace(_job(one), result=None) for one in found]

    def counts(self) -> dict[str, int]:
        """How many jobs wait and how many run."""
        found = self._client.list_workflows(
            name=WORKFLOW, application_name=APP, status=list(_LIVE), load_input=False, load_output=False
        )
        counts = dict.fromkeys((JobStatus.QUEUED.value, JobStatus.RUNNING.value), 0)
        for one in found:
            counts[_STATUS[one.status].value] += 1
        return counts

    def cancel(self, job_id: str) -> None:
        """Take a job back: one that waits never runs, one that runs is ended by its worker within seconds."""
        self._client.cancel_workflow(job_id)

    def retry(self, job: Job) -> Job:
        """Queue a job that is over once more, as a job of its own."""
        return self.submit(replace(job.spec, retry_of=job.id), job.hardware)

    def log(self, job_id: str, after: int) -> list[dict[str, Any]]:
        """Batches of a job's log from number `after` on, at most `_MOST_BATCHES`; none while there is none."""
        batches: list[dict[str, Any]] = []
        while len(batches) < _MOST_BATCHES:
            try:
                batch = self._client.read_stream_offset(job_id, LOG, after + len(batches), timeout_seconds=0.0)
            except error.DBOSStreamTimeoutError:
                break
            batches.append(batch)
        return batches

    def close(self) -> None:
        """Close the connections that are held."""
        self._client.destroy()


def _job(found: WorkflowStatus) -> Job:
    given: Any = found.input
    outcome = JobOutcome(**found.output) if isinstance(found.output, dict) else None
    status = _STATUS.get(found.status, JobStatus.RUNNING)
    if found.status == "SUCCESS":
        status = JobStatus.DONE if outcome is not None and outcome.exit_code == 0 else JobStatus.FAILED
    return Job(
        id=found.workflow_id,
        spec=JobSpec.from_json(given["args"][0]),
        hardware=found.queue_name or "",
        status=status,
        worker=found.executor_id.rpartition("/")[0] if found.executor_id else None,
        attempts=found.recovery_attempts or 0,
        created_at=_time(found.created_at),
        updated_at=_time(found.updated_at),
        error=_error(found, outcome),
        result=outcome.result if outcome else None,
    )


def _error(found: WorkflowStatus, outcome: JobOutcome | None) -> str | None:
    if outcome is not None:
        return outcome.error
    return str(found.error) if found.error else None


def _time(epoch_ms: int | None) -> datetime:
    return datetime.fromtimestamp((epoch_ms or 0) / 1e3, UTC)
