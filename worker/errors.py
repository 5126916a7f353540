"""Why a job stops. One tree for the whole worker.

Stopped
├── JobFailed             cannot succeed, however often it is tried: state `failed`, with code and numbers
├── JobCancelled          its owner asked for it: state `cancelled`
├── JobParked             its owner wants it to pause, or its worker is to stop: given back, once its state is kept
├── LeaseLost             somebody else may hold the job: write nothing more, report nothing
├── DiskFull              nothing more can be written: give the job back for another attempt
└── EngineUnavailable     an engine does not answer: wait, then give the job back for another attempt
"""

from __future__ import annotations


class Stopped(Exception):
    """Base of every reason to stop that is not a bug."""


class JobFailed(Stopped):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class JobCancelled(Stopped):
    """Cancellation was requested and is honoured here."""


class JobParked(Stopped):
    """The job is to be given back with its state: its owner asked for a pause, or its worker was asked to stop, as in a
    deployment."""


class LeaseLost(Stopped):
    """Fenced by a newer epoch, or no heartbeat got through for a whole lease."""


class DiskFull(Stopped):
    """There is no room, or no more of a quota; the text says what the system said."""


class EngineUnavailable(Stopped):
    """An engine refuses, is silent or answers with a server error; the text says which and how."""
