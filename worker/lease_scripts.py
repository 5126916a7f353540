"""The scripts by which a worker claims a job, keeps it, reports on it, gives it back, parks and ends it.

Owns: what each does and answers; every write of a worker to a job goes through one of them and is refused when another
claim holds it. A claim is its epoch and its name: a Redis that lost its last second gives an epoch twice. Does not own:
when they are run (lease.py), the states (contracts.job_states), what a job's owner asks for (service/job_scripts.py).
"""

from __future__ import annotations

from typing import Final

from bon_algos.audit_entries import AUDIT_LUA
from bon_algos.contracts import JOB_LUA

_FENCE: Final = """
local owner = redis.call('HMGET', KEYS[1], 'epoch', 'claim', 'state')
if (owner[1] or '') .. ':' .. (owner[2] or '') ~= ARGV[1] or owner[3] ~= 'running' then return 0 end
"""
_ASKED: Final = """
local function asked(field)
  local said = redis.call('HGET', KEYS[1], field)
  return said and said ~= '' and said ~= '0'
end
"""
_WHAT_IS_ASKED: Final = "if asked('cancel') then return 2 elseif asked('pause') then return 3 else return 1 end\n"

CLAIM: Final = (
    JOB_LUA
    + _ASKED
    + """
local job = redis.call('HMGET', KEYS[1], 'state', 'trained_tokens', 'sampled_tokens', 'claim', 'epoch')
if job[1] == 'running' and job[4] == ARGV[4] then
  spend(KEYS[1])
  redis.call('HSET', KEYS[1], 'lease_until', string.format('%d', now + ARGV[1]))
  return tonumber(job[5])
end
if job[1] == 'paused' then return -4 end
if job[1] ~= 'queued' and job[1] ~= 'running' then return -1 end
if job[1] == 'running' and is_held(KEYS[1]) then return -2 end
if asked('cancel') then move(KEYS[1], KEYS[2], 'cancelled') return -3 end
if asked('pause') then move(KEYS[1], KEYS[2], 'paused') return -4 end
redis.call('HDEL', KEYS[1], 'dispatched_at')
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
local attempt = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
redis.call('HSETNX', KEYS[1], 'started_at', string.format('%.3f', now / 1000))
redis.call('HSET', KEYS[1], 'lease_until', string.format('%d', now + ARGV[1]), 'worker', ARGV[2],
  'processes', ARGV[3], 'claim', ARGV[4], 'seen_at', string.format('%d', now), 'trained_before', job[2] or '0',
  'sampled_before', job[3] or '0')
move(KEYS[1], KEYS[2], 'running', 'attempt', attempt)
return epoch
"""
)
"""KEYS job, events. ARGV lease ms, worker, processes that train, a name of this claim. -> epoch; -1 final or unknown,
-2 held, -3 cancelled, -4 paused. The message has arrived: when the job is lost the next one is sent at once. The same
claim again, whose reply was lost, is answered the same: no further attempt is counted."""

BEAT: Final = (
    JOB_LUA
    + _ASKED
    + _FENCE
    + "spend(KEYS[1])\nredis.call('HSET', KEYS[1], 'lease_until', string.format('%d', now + ARGV[2]))\n"
    + _WHAT_IS_ASKED
)
"""KEYS job. ARGV claim, lease ms. -> 0 fenced, 1 kept, 2 kept and to be cancelled, 3 kept and to be paused."""

PROGRESS: Final = (
    JOB_LUA
    + _ASKED
    + _FENCE
    + """
local before = redis.call('HMGET', KEYS[1], 'trained_before', 'sampled_before')
redis.call('HSET', KEYS[1], 'phase', ARGV[3], 'step', ARGV[4], 'steps', ARGV[5], 'metrics', ARGV[6],
  'seconds_left', ARGV[7], 'estimated_finish', ARGV[7] ~= '' and string.format('%.0f', now / 1000 + ARGV[7]) or '',
  'trained_tokens', string.format('%d', (before[1] or 0) + ARGV[8]),
  'sampled_tokens', string.format('%d', (before[2] or 0) + ARGV[9]))
spend(KEYS[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'phase', ARGV[3], 'step', ARGV[4], 'metrics', ARGV[6])
"""
    + _WHAT_IS_ASKED
)
"""KEYS job, events. ARGV claim, events kept, phase, step, steps, metrics, seconds left, tokens that this attempt has
trained on and sampled. -> as BEAT."""

CHECKPOINT: Final = (
    JOB_LUA
    + _FENCE
    + """
redis.call('HSET', KEYS[3], ARGV[2], string.format('{"created_at": %.3f, "metrics": %s}', now / 1000, ARGV[3]))
local steps = redis.call('HKEYS', KEYS[3])
table.sort(steps, function(one, other) return tonumber(one) > tonumber(other) end)
for place, step in ipairs(steps) do
  if place > tonumber(ARGV[4]) then redis.call('HDEL', KEYS[3], step) end
end
tell(KEYS[1], KEYS[2], 'checkpoint', ARGV[2])
return 1
"""
)
"""KEYS job, events, checkpoints. ARGV claim, step, metrics, states kept. -> 0 fenced, 1 told."""

PARK: Final = (
    JOB_LUA
    + _ASKED
    + _FENCE
    + """
spend(KEYS[1])
if asked('cancel') then move(KEYS[1], KEYS[2], 'cancelled') return 2 end
redis.call('HINCRBY', KEYS[1], 'parked', 1)
redis.call('HDEL', KEYS[1], 'dispatched_at')
move(KEYS[1], KEYS[2], asked('pause') and 'paused' or 'queued')
return 1
"""
)
"""KEYS job, events. ARGV claim. -> 0 fenced, 1 given back: paused, or queued where nobody wants a pause or no more,
2 cancelled instead. Queued, it is woken for at once; in either case the attempt is none that has failed."""

RELEASE: Final = (
    JOB_LUA
    + _FENCE
    + """
spend(KEYS[1])
redis.call('HSET', KEYS[1], 'lease_until', '0', 'last_error', ARGV[2])
redis.call('HDEL', KEYS[1], 'claim')
tell(KEYS[1], KEYS[2], 'given_back', ARGV[2])
return 1
"""
)
"""KEYS job, events. ARGV claim, reason. -> 0 fenced, 1 given back: the reconciler takes it up or counts it out. The
claim is over with it: a beat that was on its way would hold the job for another lease."""

FINISH: Final = (
    JOB_LUA
    + AUDIT_LUA
    + _ASKED
    + _FENCE
    + """
local state, answer = ARGV[2], 1
if state == 'succeeded' and asked('cancel') then state, answer = 'cancelled', 2 end
if state == 'succeeded' then
  if redis.call('ZSCORE', KEYS[5], ARGV[6]) then return 3 end
  for i = 6, #KEYS do
    local parent = redis.call('HGET', KEYS[i], 'record')
    if parent and cjson.decode(parent).tainted == true then return 4 end
  end
  if redis.call('HEXISTS', KEYS[3], 'record') == 0 and not is_newest(ARGV[8]) then return 5 end
end
spend(KEYS[1])
if state == 'succeeded' then
  redis.call('HSETNX', KEYS[3], 'version', '1')
  if redis.call('HSETNX', KEYS[3], 'record', ARGV[4]) == 1 then note(ARGV[9]) end
  redis.call('ZADD', KEYS[4], 'NX', ARGV[5], ARGV[6])
  redis.call('HSET', KEYS[1], 'policy_id', ARGV[6], 'report', ARGV[7])
elseif state == 'failed' then
  redis.call('HSET', KEYS[1], 'error_code', ARGV[4], 'error_message', ARGV[5])
end
move(KEYS[1], KEYS[2], state)
return answer
"""
)
"""KEYS job, events[, policy, policies, deleted policies, its parents]. ARGV claim, state, events kept, then for
`succeeded` record, created_at, policy id, report and the audit's entry in two (AUDIT_LUA); for `failed` code, message.
-> 0 fenced, 1 done, 2 done as cancelled: a success that comes after a cancellation is none, 3 nothing done: this very
policy was deleted, 4 nothing done: a parent is tainted, 5 nothing done: others wrote to the audit, again with another
entry. A policy that exists is left as it is, and no entry tells of it."""
