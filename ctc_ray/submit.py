"""Run a stage as a Ray job: the same command, on the cluster that owns the dashboard."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence

from ctc_ray.errors import ResourceError


def entrypoint_of(stage: str, arguments: Sequence[str]) -> str:
    """Shell command that the job runs on the head node.

    Args:
        stage: sub-command of `ctc-ray`.
        arguments: its arguments.

    Returns:
        A quoted command line; ids with spaces or quotes survive it.
    """
    return shlex.join(["python", "-m", "ctc_ray.cli", stage, *arguments])


def submit_stage(stage: str, arguments: Sequence[str], *, address: str, wait: bool) -> int:
    """Submit one stage, and follow its log.

    Args:
        stage: sub-command of `ctc-ray`.
        arguments: its arguments; paths must be reachable from the cluster.
        address: dashboard, http://head:8265.
        wait: whether to follow the job until it ends.

    Returns:
        0 when the job was submitted (and, with `wait`, succeeded), else 1.

    Raises:
        ResourceError: the dashboard cannot be reached.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job_id = client.submit_job(entrypoint=entrypoint_of(stage, arguments))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"cannot submit to {address}: {error}. Is the dashboard reachable, and ray[default] installed there?"
        ) from error
    print(f"submitted {job_id}: {stage}", flush=True)  # noqa: T201 - the id is the command's output
    if not wait:
        return 0

    async def follow() -> None:
        async for lines in client.tail_job_logs(job_id):
            sys.stdout.write(lines)

    asyncio.run(follow())
    status = client.get_job_status(job_id)
    print(f"{job_id}: {status}", flush=True)  # noqa: T201 - the status is the command's output
    return 0 if status == JobStatus.SUCCEEDED else 1
