"""Long work as QEMU's jobs: identity, status and progress; the work itself is elsewhere.

The states, and the verbs that each accepts, are those of QEMU's job.c, as far as these jobs reach them:

    created -> running -> waiting -> pending -> concluded -> null
                       -> aborting (failed or cancelled)  -> concluded -> null

A job stays listed as `concluded`, with its error if it has one, until it is dismissed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.authority.ledger import Budget

JOBS_MAX: Final = 4096  # that are not dismissed; QEMU has no limit
CANCELLED: Final = "Operation canceled"  # strerror(ECANCELED), QEMU's error of a cancelled job

# verb -> the states that accept it
_VERBS: Final = {
    "cancel": frozenset(("created", "running", "waiting", "pending")),
    "dismiss": frozenset(("concluded",)),
}
_ONE: Final = {"jobs": 1}
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")


class Job:
    """One piece of long work. The numbers may be set from any thread, the states only from the event loop."""

    def __init__(self, job_id: str, kind: str, total: int, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self.id = job_id
        self.kind = kind
        self.status = "undefined"
        self.current = 0  # bytes
        self.total = total  # bytes; the estimate may change
        self.error: str | None = None
        self.cancelled = False  # read by the work, in any thread
        self.interrupt: Callable[[], None] = lambda: None  # set by work that must be woken to see `cancelled`
        self.result: Any = None  # of a job that succeeded; its form depends on the kind
        self.rows = 0  # of the result, at most; 0 if they need not be counted
        self.budget: Budget | None = None  # to which it is charged
        self._emit = emit

    def go(self, *states: str) -> None:
        """Go through states, each with an event."""
        for state in states:
            self.status = state
            self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": state})

    def check(self, verb: str) -> None:
        """Refuse a verb that the job's state does not accept."""
        if self.status not in _VERBS[verb]:
            raise QmpError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    def cancel(self) -> None:
        """Ask the work to stop; it ends as `concluded` with the error CANCELLED, at its next step."""
        self.check("cancel")
        self.cancelled = True
        self.interrupt()

    def conclude(self, error: str | None) -> None:
        """End the job; without an error, successfully."""
        self.error = CANCELLED if self.cancelled and error is not None else error
        if error is not None:
            self.rows = 0
        self.interrupt = lambda: None
        if self.error is None:
            self.current = self.total
            self.go("waiting", "pending", "concluded")
        else:
            self.go("aborting", "concluded")

    def describe(self) -> dict[str, Any]:
        """Its entry in query-jobs."""
        entry = {"id": self.id, "type": self.kind, "status": self.status, "current-progress": self.current,
                 "total-progress": self.total}
        if self.error is not None:
            entry["error"] = self.error
        return entry


class Jobs:
    """All jobs that have not been dismissed."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._emit = emit
        self._jobs: dict[str, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        """The newest first, as QEMU lists them."""
        return iter(reversed(list(self._jobs.values())))

    def create(self, job_id: str, kind: str, total: int, budget: Budget | None = None) -> Job:
        """A new job, `created` and then `running`, charged until it is dismissed.

        QmpError if the id is malformed or taken, or it would be one too many.
        """
        self.check_id(job_id)
        if budget is not None:
            budget.reserve(_ONE)
        job = self._jobs[job_id] = Job(job_id, kind, total, self._emit)
        job.budget = budget
        job.go("created", "running")
        return job

    def check_id(self, job_id: str) -> None:
        """Refuse an id that cannot be a new job's."""
        if not _IDENTIFIER.fullmatch(job_id):
            raise QmpError(f"Invalid job ID '{job_id}'")
        if job_id in self._jobs:
            raise QmpError(f"Job ID '{job_id}' already in use")
        if len(self._jobs) >= JOBS_MAX:
            raise QmpError(f"there are {len(self._jobs)} jobs already, the most that may exist: dismiss some with"
                           " 'job-dismiss'")

    def find(self, job_id: str) -> Job:
        """The job with that id; QmpError if there is none."""
        job = self._jobs.get(job_id)
        if job is None:
            raise QmpError("Job not found")
        return job

    def dismiss(self, job_id: str) -> None:
        """Forget a concluded job."""
        job = self.find(job_id)
        job.check("dismiss")
        del self._jobs[job_id]
        if job.budget is not None:
            job.budget.account.subtract(_ONE)
        job.go("null")
