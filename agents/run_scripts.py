"""The Lua of the run log: each script is one step for every reader and writer, so no crash leaves half of one.

Every script may be sent again after its reply was lost: it finds its own work done and answers the same. What ends,
stops, renews or takes over a run may exceed the store's memory limit, for a run that cannot go on for lack of memory
must still be able to end. Times are milliseconds of the store's own clock, so that no worker's clock matters. A run's
keys and its conversation's share the tenant's hash tag, so a Redis cluster runs these too. What the replies mean is in
`agents.run_store`.
"""

from typing import Final

_ALLOWED: Final = "#!lua flags=allow-oom"
_NOW_MS: Final = """
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
"""

# KEYS: run, events, leases, idempotency; for a turn also conversation, turns, order, variants, lock, index, feedback.
# ARGV: run id, owner, lease ms, keep s, now µs, request, background, body hash or '', prefix of run keys;
# for a turn also mode, turn id, turn JSON, variant JSON, title, edited turn, conversation id.
BEGIN_RUN: Final = f"""{_NOW_MS}
local id, conversation = ARGV[1], KEYS[5] ~= nil
local function told(word, turn)
  if not conversation then return {{word, turn or ''}} end
  return {{word, turn or '', redis.call('LRANGE', KEYS[6], 0, -1), redis.call('HGETALL', KEYS[7]),
    redis.call('HGETALL', KEYS[8])}}
end
local known = redis.call('HMGET', KEYS[1], 'state', 'turn')
if known[1] == 'void' then return {{'void'}} end
if known[1] then return told('ok', known[2]) end
local mode, turn = ARGV[10], ARGV[11]
if ARGV[8] ~= '' then
  local owner = redis.call('HMGET', KEYS[4], 'run', 'hash', 'retry', 'turn')
  if owner[1] then
    if owner[2] ~= ARGV[8] then return {{'mismatch'}} end
    if owner[3] ~= '1' then
      local run = redis.call('HMGET', ARGV[9] .. owner[1], 'conversation', 'turn', 'created')
      return {{'joined', owner[1], run[1] or '', run[2] or '', run[3] or '0'}}
    end
    if conversation and mode == 'new' then
      local last = redis.call('LINDEX', KEYS[6], -1)
      if last and cjson.decode(last).id == owner[4] then mode = 'regenerate' end
    end
  end
end
if conversation then
  if redis.call('EXISTS', KEYS[5]) == 0 then return {{'unknown'}} end
  local holder = redis.call('GET', KEYS[9])
  if holder and redis.call('HGET', ARGV[9] .. holder, 'state') == 'running' then return {{'busy'}} end
  if mode == 'regenerate' then
    local last = redis.call('LINDEX', KEYS[6], -1)
    if not last then return {{'empty'}} end
    turn = cjson.decode(last).id
  else
    if mode == 'edit' then
      local turns = redis.call('LRANGE', KEYS[6], 0, -1)
      local ids, from = {{}}, nil
      for i, raw in ipairs(turns) do
        ids[i] = cjson.decode(raw).id
        if ids[i] == ARGV[15] then from = i end
      end
      if not from then return {{'no_turn'}} end
      for i = from, #ids do
        local runs = redis.call('HGET', KEYS[7], ids[i]) or ''
        for run in string.gmatch(runs, '%S+') do
          redis.call('HDEL', KEYS[8], run)
          redis.call('HDEL', KEYS[11], run)
        end
        redis.call('HDEL', KEYS[7], ids[i])
      end
      if from == 1 then redis.call('DEL', KEYS[6]) else redis.call('LTRIM', KEYS[6], 0, from - 2) end
    end
    redis.call('RPUSH', KEYS[6], ARGV[12])
    if redis.call('HGET', KEYS[5], 'title') == '' then redis.call('HSET', KEYS[5], 'title', ARGV[14]) end
  end
  local runs = redis.call('HGET', KEYS[7], turn)
  redis.call('HSET', KEYS[7], turn, runs and (runs .. ' ' .. id) or id)
  redis.call('HSET', KEYS[8], id, ARGV[13])
  redis.call('SET', KEYS[9], id)
  redis.call('HSET', KEYS[5], 'updated', ARGV[5], 'turns', redis.call('LLEN', KEYS[6]))
  redis.call('ZADD', KEYS[10], ARGV[5], ARGV[16])
end
redis.call('HSET', KEYS[1], 'state', 'running', 'owner', ARGV[2], 'epoch', 1, 'request', ARGV[6], 'created', ARGV[5],
  'background', ARGV[7], 'conversation', ARGV[16] or '', 'turn', conversation and turn or '', 'stop', 0)
local accepted = {{kind = 'accepted', run_id = id}}
if conversation then accepted.conversation_id, accepted.turn_id = ARGV[16], turn end
redis.call('RPUSH', KEYS[2], cjson.encode(accepted))
redis.call('ZADD', KEYS[3], now_ms() + tonumber(ARGV[3]), id)
if ARGV[8] ~= '' then
  redis.call('DEL', KEYS[4])
  redis.call('HSET', KEYS[4], 'run', id, 'hash', ARGV[8], 'turn', conversation and turn or '')
  redis.call('EXPIRE', KEYS[4], ARGV[4])
end
return told('ok', conversation and turn or '')
"""

# KEYS: run, events, journal of each run. ARGV: owner, then of each run: epoch, events stored before, journal entries
# stored before, journal entry or '', number of events, events.... Answers each run's stop flag, or 'lost' to a worker
# that no longer owns it.
APPEND: Final = """
local function append(key, events, journal, at, count)
  local run = redis.call('HMGET', key, 'owner', 'epoch', 'state', 'stop')
  if run[1] ~= ARGV[1] or run[2] ~= ARGV[at] or run[3] ~= 'running' then return 'lost' end
  local stored = redis.call('LLEN', events)
  if stored < tonumber(ARGV[at + 1]) then return 'lost' end
  if count > 0 and stored == tonumber(ARGV[at + 1]) then
    redis.call('RPUSH', events, unpack(ARGV, at + 5, at + 4 + count))
  end
  if ARGV[at + 3] ~= '' and redis.call('LLEN', journal) == tonumber(ARGV[at + 2]) then
    redis.call('RPUSH', journal, ARGV[at + 3])
  end
  return run[4]
end
local answers, at = {}, 2
for i = 1, #KEYS, 3 do
  local count = tonumber(ARGV[at + 4])
  answers[#answers + 1] = append(KEYS[i], KEYS[i + 1], KEYS[i + 2], at, count)
  at = at + 5 + count
end
return answers
"""

# KEYS: run, events, journal, leases, idempotency; for a turn also conversation, variants, lock, index.
# ARGV: owner, epoch, events stored before, run id, state, now µs, keep s, retry (1: the key may be used again),
# has key, variant JSON, conversation id, events.... A conversation deleted meanwhile stays deleted.
END_RUN: Final = """#!lua flags=allow-oom
local run = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'state')
if run[1] ~= ARGV[1] or run[2] ~= ARGV[2] then return 'lost' end
if run[3] ~= 'running' then return 'ended' end
local stored = redis.call('LLEN', KEYS[2])
if stored ~= tonumber(ARGV[3]) then return 'lost' end
redis.call('RPUSH', KEYS[2], unpack(ARGV, 12))
redis.call('HSET', KEYS[1], 'state', ARGV[5], 'ended', ARGV[6])
redis.call('DEL', KEYS[3])
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('EXPIRE', KEYS[2], ARGV[7])
redis.call('ZREM', KEYS[4], ARGV[4])
if ARGV[9] == '1' and redis.call('HGET', KEYS[5], 'run') == ARGV[4] then
  if ARGV[8] == '1' then redis.call('HSET', KEYS[5], 'retry', 1) end
  redis.call('EXPIRE', KEYS[5], ARGV[7])
end
if KEYS[6] then
  if redis.call('GET', KEYS[8]) == ARGV[4] then redis.call('DEL', KEYS[8]) end
  if redis.call('HEXISTS', KEYS[7], ARGV[4]) == 1 then
    redis.call('HSET', KEYS[7], ARGV[4], ARGV[10])
    redis.call('HSET', KEYS[6], 'updated', ARGV[6])
    redis.call('ZADD', KEYS[9], ARGV[6], ARGV[11])
  end
end
return 'ok'
"""

# KEYS: run, leases. ARGV: run id, owner, epoch, lease ms (0 gives the run away). Answers the stop flag or 'lost'.
RENEW: Final = f"""{_ALLOWED}{_NOW_MS}
local run = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'state', 'stop')
if run[1] ~= ARGV[2] or run[2] ~= ARGV[3] or run[3] ~= 'running' then return 'lost' end
redis.call('ZADD', KEYS[2], ARGV[4] == '0' and 0 or now_ms() + tonumber(ARGV[4]), ARGV[1])
return run[4]
"""

# KEYS: leases. ARGV: prefix of run keys, new owner, lease ms, most runs, run id or '' (this one, whatever its lease).
# Answers run id and epoch in turns.
TAKE: Final = f"""{_ALLOWED}{_NOW_MS}
local now, taken = now_ms(), {{}}
local due = {{ARGV[5]}}
if ARGV[5] == '' then due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[4]) end
for _, id in ipairs(due) do
  local key = ARGV[1] .. id
  if redis.call('HGET', key, 'state') == 'running' then
    redis.call('HSET', key, 'owner', ARGV[2])
    taken[#taken + 1] = id
    taken[#taken + 1] = redis.call('HINCRBY', key, 'epoch', 1)
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), id)
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return taken
"""

# KEYS: searcher. ARGV: worker, ms. Answers 1 where this worker is to look for lost runs for so long.
SEARCH: Final = """#!lua flags=allow-oom
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: leases. ARGV: tenant, channel. Answers 1 where leases of the tenant are over, and tells all workers.
LOST: Final = f"""{_ALLOWED}{_NOW_MS}
if redis.call('ZCOUNT', KEYS[1], '-inf', now_ms()) == 0 then return 0 end
redis.call('PUBLISH', ARGV[2], ARGV[1])
return 1
"""

# KEYS: run. ARGV: run id, prefix of the workers' channels. Answers the run's state before, or 'unknown'.
STOP: Final = """#!lua flags=allow-oom
local run = redis.call('HMGET', KEYS[1], 'state', 'owner')
if not run[1] or run[1] == 'void' then return 'unknown' end
if run[1] == 'running' then
  redis.call('HSET', KEYS[1], 'stop', 1)
  redis.call('PUBLISH', ARGV[2] .. run[2], ARGV[1])
end
return run[1]
"""

# KEYS: run. ARGV: plan, how many of its steps its author has seen begin. Keeps the plan that a run is to go on with,
# unless more of them have begun. Answers the run's state, 'unknown' or 'begun'.
REPLAN: Final = """
local run = redis.call('HMGET', KEYS[1], 'state', 'begun')
if not run[1] or run[1] == 'void' then return 'unknown' end
if run[1] ~= 'running' then return run[1] end
if tonumber(run[2] or '0') > tonumber(ARGV[2]) then return 'begun' end
redis.call('HSET', KEYS[1], 'plan', ARGV[1])
return run[1]
"""

# KEYS: run. ARGV: how many of its steps will have begun. The plan to go on with, if one was kept; it is fixed that far.
NEXT_STEP: Final = """#!lua flags=allow-oom
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return false end
redis.call('HSET', KEYS[1], 'begun', ARGV[1])
return redis.call('HGET', KEYS[1], 'plan')
"""

# KEYS: run, events, journal, leases, idempotency; for a turn also conversation, turns, order, variants, lock.
# ARGV: run id, owner, keep-out s. Takes back a BEGIN_RUN whose reply never came, before or after it happens.
UNDO: Final = """#!lua flags=allow-oom
local run = redis.call('HMGET', KEYS[1], 'state', 'owner', 'epoch', 'turn')
if not run[1] then
  redis.call('HSET', KEYS[1], 'state', 'void')
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  return 'void'
end
if run[1] ~= 'running' or run[2] ~= ARGV[2] or run[3] ~= '1' or redis.call('LLEN', KEYS[2]) ~= 1 then return 'kept' end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('ZREM', KEYS[4], ARGV[1])
if redis.call('HGET', KEYS[5], 'run') == ARGV[1] then redis.call('DEL', KEYS[5]) end
redis.call('HSET', KEYS[1], 'state', 'void')
redis.call('EXPIRE', KEYS[1], ARGV[3])
if KEYS[6] then
  if redis.call('GET', KEYS[10]) == ARGV[1] then redis.call('DEL', KEYS[10]) end
  redis.call('HDEL', KEYS[9], ARGV[1])
  local runs = {}
  for other in string.gmatch(redis.call('HGET', KEYS[8], run[4]) or '', '%S+') do
    if other ~= ARGV[1] then runs[#runs + 1] = other end
  end
  if #runs > 0 then
    redis.call('HSET', KEYS[8], run[4], table.concat(runs, ' '))
  else
    redis.call('HDEL', KEYS[8], run[4])
    local last = redis.call('LINDEX', KEYS[7], -1)
    if last and cjson.decode(last).id == run[4] then redis.call('RPOP', KEYS[7]) end
    redis.call('HSET', KEYS[6], 'turns', redis.call('LLEN', KEYS[7]))
  end
end
return 'undone'
"""

# KEYS: run, events. ARGV: number of the first event, bytes. Answers the run's state and the events from there on that
# fit, one at least.
PAGE: Final = """
local events, size, at = {}, 0, tonumber(ARGV[1])
while true do
  local block = redis.call('LRANGE', KEYS[2], at, at + 15)
  for _, event in ipairs(block) do
    if size > 0 and size + #event > tonumber(ARGV[2]) then return {redis.call('HGET', KEYS[1], 'state'), events} end
    events[#events + 1] = event
    size = size + #event
  end
  if #block < 16 then return {redis.call('HGET', KEYS[1], 'state'), events} end
  at = at + 16
end
"""

# KEYS: run, events, journal. Answers the run's state, or 'unknown'; one that still runs stays.
FORGET: Final = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'void' then return 'unknown' end
if state ~= 'running' then redis.call('DEL', KEYS[1], KEYS[2], KEYS[3]) end
return state
"""
