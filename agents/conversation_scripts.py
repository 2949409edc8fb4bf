"""The Lua that changes conversations: each script is one step for every reader, so a turn is never half written.

Times are microseconds since 1970. The keys of one tenant share a hash tag, so a Redis cluster runs these too.
"""

from typing import Final

# KEYS: conversation, turns, order, variants, lock, index, feedback.
# ARGV: run, lease ms, now, mode, turn, turn JSON, variant JSON, title, edited turn, conversation id.
# A retry after a lost answer finds its own run in the lock and only reads.
BEGIN_TURN: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {'unknown'} end
local holder = redis.call('GET', KEYS[5])
if holder and holder ~= ARGV[1] then return {'busy'} end
if not holder then
  local turn = ARGV[5]
  if ARGV[4] == 'regenerate' then
    local last = redis.call('LINDEX', KEYS[2], -1)
    if not last then return {'empty'} end
    turn = cjson.decode(last).id
  else
    if ARGV[4] == 'edit' then
      local turns = redis.call('LRANGE', KEYS[2], 0, -1)
      local ids, from = {}, nil
      for i, raw in ipairs(turns) do
        ids[i] = cjson.decode(raw).id
        if ids[i] == ARGV[9] then from = i end
      end
      if not from then return {'no_turn'} end
      for i = from, #ids do
        local runs = redis.call('HGET', KEYS[3], ids[i]) or ''
        for run in string.gmatch(runs, '%S+') do
          redis.call('HDEL', KEYS[4], run)
          redis.call('HDEL', KEYS[7], run)
        end
        redis.call('HDEL', KEYS[3], ids[i])
      end
      if from == 1 then redis.call('DEL', KEYS[2]) else redis.call('LTRIM', KEYS[2], 0, from - 2) end
    end
    redis.call('RPUSH', KEYS[2], ARGV[6])
    if redis.call('HGET', KEYS[1], 'title') == '' then redis.call('HSET', KEYS[1], 'title', ARGV[8]) end
  end
  local runs = redis.call('HGET', KEYS[3], turn)
  redis.call('HSET', KEYS[3], turn, runs and (runs .. ' ' .. ARGV[1]) or ARGV[1])
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[7])
  redis.call('SET', KEYS[5], ARGV[1], 'PX', ARGV[2])
  redis.call('HSET', KEYS[1], 'updated', ARGV[3], 'turns', redis.call('LLEN', KEYS[2]))
  redis.call('ZADD', KEYS[6], ARGV[3], ARGV[10])
end
return {'ok', redis.call('LRANGE', KEYS[2], 0, -1), redis.call('HGETALL', KEYS[3]), redis.call('HGETALL', KEYS[4])}
"""

# KEYS: variants, lock. ARGV: run, lease ms, variant JSON or ''. Answers 0 to a run that no longer owns the turn.
KEEP_TURN: Final = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
return 1
"""

# KEYS: variants, lock, conversation, index. ARGV: run, variant JSON, now, conversation id.
# A conversation or turn deleted meanwhile stays deleted.
END_TURN: Final = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3], 'updated', ARGV[3])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[4])
return 1
"""

# KEYS: conversation. ARGV: title.
RENAME: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'title', ARGV[1])
return 1
"""

# KEYS: variants, feedback. ARGV: run, value or ''.
RATE: Final = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[2] == '' then redis.call('HDEL', KEYS[2], ARGV[1]) else redis.call('HSET', KEYS[2], ARGV[1], ARGV[2]) end
return 1
"""
