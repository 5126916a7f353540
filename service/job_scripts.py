"""The scripts by which a job's owner submits, pauses, resumes and cancels it, and what their answers mean.

Owns: what each may do from which state. Does not own: the states (contracts.job_states), HTTP, or what a worker and the
reconciler do (worker/lease.py, dispatch.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from bon_algos.audit_entries import AUDIT_LUA
from bon_algos.contracts import FINAL_JOB_STATES, JOB_LUA
from bon_algos.contracts.job_states import JOB_PREFIX
from service.audit import OVERTAKEN
from service.errors import Conflict, GatewayError, JobNotFound, QueueFull

Wish = Literal["pause", "resume", "cancel"]
MOST_OPEN_JOBS: Final = 100
"""Of a tenant, queued and running: workers are shared by all."""

# How many of the open jobs are a tenant's.
_OPEN: Final = (
    f"local PREFIX, OVERTAKEN = '{JOB_PREFIX}', '{OVERTAKEN}'\n"
    + """
local function open_jobs(all, tenant)
  local own = 0
  for _, id in ipairs(redis.call('SMEMBERS', all)) do
    local job = redis.call('HMGET', PREFIX .. id, 'tenant', 'state')
    if job[1] == tenant and (job[2] == 'queued' or job[2] == 'running') then own = own + 1 end
  end
  return own
end
"""
)

# KEYS: job, events, jobs index, open jobs, idempotency key, files. ARGV: job id, spec, tenant, model, priority, steps,
# digest of the body or "" without an idempotency key, its life in seconds, the file it learns from or "", how many open
# jobs a tenant may have, the audit's entry in two. Returns "" for a new job, "no_file" when that file was deleted
# meanwhile, "full" when the tenant has as many jobs, OVERTAKEN when the entry does not follow the newest one, else
# "digest job" of the earlier request.
SUBMIT: Final = (
    JOB_LUA
    + AUDIT_LUA
    + _OPEN
    + """
if ARGV[7] ~= '' then
  local earlier = redis.call('GET', KEYS[5])
  if earlier then return earlier end
end
if ARGV[9] ~= '' and redis.call('HEXISTS', KEYS[6], ARGV[9]) == 0 then return 'no_file' end
if open_jobs(KEYS[4], ARGV[3]) >= tonumber(ARGV[10]) then return 'full' end
if not is_newest(ARGV[11]) then return OVERTAKEN end
if ARGV[7] ~= '' then
  redis.call('SET', KEYS[5], ARGV[7] .. ' ' .. ARGV[1], 'EX', ARGV[8])
end
local at = string.format('%.3f', now / 1000)
redis.call('HSET', KEYS[1], 'spec', ARGV[2], 'tenant', ARGV[3], 'model', ARGV[4], 'priority', ARGV[5],
  'steps', ARGV[6], 'state', 'queued', 'phase', 'queued', 'created_at', at, 'epoch', 0, 'attempts', 0)
tell(KEYS[1], KEYS[2], 'state', 'queued')
redis.call('ZADD', KEYS[3], at, ARGV[1])
redis.call('SADD', KEYS[4], ARGV[1])
note(ARGV[12])
return ''
"""
)

# The three below. KEYS: job, events, open jobs, idempotency key. ARGV: job id, tenant, digest of the request or ""
# without an idempotency key, its life in seconds, how many open jobs a tenant may have, the audit's entry in two, which
# is written where anything is changed. Return 'done' when the job was moved, 'asked' when its worker will be told,
# 'digest answer' of the earlier request that was granted, OVERTAKEN when the entry does not follow the newest one, else
# what stands in the way: 'unknown' to the tenant, the job's state, 'cancelling', or 'full' when the tenant has as many
# jobs.
_OWNED: Final = (
    JOB_LUA
    + AUDIT_LUA
    + _OPEN
    + """
local job = redis.call('HMGET', KEYS[1], 'tenant', 'state', 'cancel', 'pause')
if job[1] ~= ARGV[2] then return 'unknown' end
local state, cancelling, pausing = job[2], job[3] == '1', job[4] == '1'
local earlier = ARGV[3] ~= '' and redis.call('GET', KEYS[4])
if earlier then return earlier end
if not is_newest(ARGV[6]) then return OVERTAKEN end
local function granted(answer)
  if ARGV[3] ~= '' then redis.call('SET', KEYS[4], ARGV[3] .. ' ' .. answer, 'EX', ARGV[4]) end
  return answer
end
local function done()
  note(ARGV[7])
  return granted('done')
end
local function ask(wish)
  redis.call('HSET', KEYS[1], wish, 1)
  tell(KEYS[1], KEYS[2], 'asked', wish)
  note(ARGV[7])
end
"""
)
SCRIPTS: Final[Mapping[Wish, str]] = {
    "pause": _OWNED
    + """
if state == 'queued' then
  move(KEYS[1], KEYS[2], 'paused')
  redis.call('SREM', KEYS[3], ARGV[1])
  return done()
end
if state ~= 'running' then return state end
if cancelling then return 'cancelling' end
if not pausing then ask('pause') end
return granted('asked')
""",
    "resume": _OWNED
    + """
if state == 'paused' then
  if open_jobs(KEYS[3], ARGV[2]) >= tonumber(ARGV[5]) then return 'full' end
  redis.call('HDEL', KEYS[1], 'dispatched_at')
  move(KEYS[1], KEYS[2], 'queued')
  redis.call('SADD', KEYS[3], ARGV[1])
  return done()
end
if state ~= 'running' or not pausing or cancelling then return state end
redis.call('HDEL', KEYS[1], 'pause')
tell(KEYS[1], KEYS[2], 'asked', 'resume')
note(ARGV[7])
return granted('asked')
""",
    "cancel": _OWNED
    + """
if state == 'queued' or state == 'paused' then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  move(KEYS[1], KEYS[2], 'cancelled')
  redis.call('SREM', KEYS[3], ARGV[1])
  return done()
end
if state ~= 'running' then return state end
if not cancelling then ask('cancel') end
return granted('asked')
""",
}
_VERBS: Final[Mapping[Wish, str]] = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}


def refusal(wish: Wish, answer: str) -> GatewayError | None:
    """What an answer of a script tells the caller; None: the wish was granted."""
    if answer in ("done", "asked"):
        return None
    if answer == "unknown":
        return JobNotFound("no such job")
    if answer == "full":
        return queue_full()
    if answer in FINAL_JOB_STATES:
        return Conflict(f"the job has {_ended(answer)}; it cannot be {_VERBS[wish]} any more", code="job_finished")
    if answer == "cancelling":
        return Conflict("the job is being cancelled; it cannot be paused any more", code="job_cancelling")
    if wish == "pause":
        return Conflict("the job is paused already; resume it or cancel it", code="already_paused")
    return Conflict(f"the job is {answer}; only a paused job is resumed", code="not_paused")


def queue_full() -> QueueFull:
    return QueueFull(f"{MOST_OPEN_JOBS} jobs are queued or running: wait until one has ended, or cancel one")


def _ended(state: str) -> str:
    return "been cancelled" if state == "cancelled" else state
