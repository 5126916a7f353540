"""The one state machine of distillation jobs: its states, what may follow on what, and the Lua that moves a job.

Owns: the table below, and the only code that writes a job's state; every script that moves one, the gateway's and the
worker's, begins with `JOB_LUA`. Does not own: who may ask for a move and when (service/jobs.py, service/dispatch.py,
worker/lease.py), nor the other fields of a job (docs/redis.md).

    queued ──claim──▶ running ──finish──▶ succeeded, failed, cancelled
     ▲  │                │ │
     │  └──pause──▶ paused ◀┘ the worker gave its lease back, or died, after it was asked to pause
     └────resume────┘

A running job is never moved by its owner's wish alone: `pause` and `cancel` are written beside the state, and whoever
holds the lease, or finds it dead, moves it. Of both, cancellation wins. A queued or a paused job has no worker, so it
is moved, or cancelled, at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
JobPriority = Literal["high", "normal", "low"]

JOB_MOVES: Final[Mapping[JobState, tuple[JobState, ...]]] = MappingProxyType(
    {
        # failed: what it would have learned from was erased.
        "queued": ("running", "paused", "failed", "cancelled"),
        # running: another attempt, where the worker of the one before died. queued: given back with its state, because
        # its worker is to stop, or because it was asked to pause and to go on before it had stopped.
        "running": ("running", "queued", "paused", "succeeded", "failed", "cancelled"),
        "paused": ("queued", "failed", "cancelled"),
        "succeeded": (),
        "failed": (),
        "cancelled": (),
    }
)
"""State -> what may follow on it."""
FINAL_JOB_STATES: Final = tuple(state for state, moves in JOB_MOVES.items() if not moves)

JOB_EVENTS_KEPT: Final = 10_000
"""Of one job, about."""
JOBS_MOVED: Final = "bonsai:jobs:moved"
"""Stream of all jobs' moves that no gateway has told webhooks of yet."""
UNRECORDED_JOBS: Final = "bonsai:jobs:unrecorded"
"""Set of the jobs to which something happened that no gateway has written beside the artefacts yet."""
JOB_PREFIX: Final = "bonsai:job:"

_NEXT: Final = ", ".join(f"{state} = ' {' '.join(moves)} '" for state, moves in JOB_MOVES.items())

JOB_LUA: Final = (
    f"local NEXT, EVENTS_KEPT = {{{_NEXT}}}, {JOB_EVENTS_KEPT}\n"
    f"local MOVED, UNRECORDED, ID_AT = '{JOBS_MOVED}', '{UNRECORDED_JOBS}', {len(JOB_PREFIX) + 1}\n"
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function tell(job, events, ...)
  local phase = redis.call('HGET', job, 'phase') or 'queued'
  redis.call('XADD', events, 'MAXLEN', '~', EVENTS_KEPT, '*', 'phase', phase, ...)
  redis.call('SADD', UNRECORDED, string.sub(job, ID_AT))
end

local function move(job, events, state, ...)
  local from = redis.call('HGET', job, 'state')
  if not string.find(NEXT[from] or '', ' ' .. state .. ' ', 1, true) then
    error('a job that is ' .. tostring(from) .. ' cannot become ' .. state)
  end
  redis.call('HSET', job, 'state', state)
  if state ~= 'running' then
    redis.call('HSET', job, 'lease_until', '0')
    redis.call('HDEL', job, 'pause', 'seconds_left', 'estimated_finish')
  end
  if NEXT[state] == '  ' then
    redis.call('HSET', job, 'phase', 'done', 'finished_at', string.format('%.3f', now / 1000))
  end
  tell(job, events, 'state', state, ...)
  local tenant = redis.call('HGET', job, 'tenant') or ''
  redis.call('XADD', MOVED, '*', 'job', string.sub(job, ID_AT), 'tenant', tenant, 'state', state)
end

local function is_held(job)
  local said = redis.call('HMGET', job, 'lease_until', 'seen_at')
  local ends, ahead = tonumber(said[1] or 0), tonumber(said[2] or 0) - now
  if ahead > 0 then
    ends = math.max(0, ends - ahead)
    redis.call('HSET', job, 'lease_until', string.format('%d', ends), 'seen_at', string.format('%d', now))
  end
  return ends > now
end

local function spend(job)
  is_held(job)
  local said = redis.call('HMGET', job, 'seen_at', 'processes', 'lease_until')
  local passed = math.max(0, math.min(now, tonumber(said[3] or 0)) - tonumber(said[1] or now))
  redis.call('HINCRBY', job, 'spent_ms', string.format('%d', passed))
  redis.call('HINCRBY', job, 'gpu_ms', string.format('%d', passed * tonumber(said[2] or 1)))
  redis.call('HSET', job, 'seen_at', string.format('%d', now))
end
"""
)
"""Defines `now`, ms on Redis' clock; `move(job, events, state, …)`, which refuses a move that is not in the table and
appends an event with further fields; `tell(job, events, …)`, which appends one alone; `is_held(job)`, whether its lease
is alive: where the clock was set back since the worker was last heard of, what was left of the lease then is left of it
now; `spend(job)`, which counts the time since the worker was last heard of as spent on the job, as far as its lease was
alive (where the clock was set forward, at most what was left of it), and as many times as it trains in processes as
spent on devices. A move is also told to
the stream of all jobs' moves, in the same script: what webhooks are made of cannot be lost between the two. That key is
no argument of the scripts, so that none can forget it."""
