"""The Lua that changes conversations: each script is one step for every reader. Turns begin and end with their runs."""

from typing import Final

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
