#!lua flags=allow-oom
-- expire: posts the checkpoints of holds that nobody settled in time, a batch at a time so that Redis is never busy
-- for long, and drops windows from the index that Redis has forgotten.
--
-- KEYS  1 due  2 orphans  3 windows' index
--
-- Returns how many holds were due.

local now = now_ms()
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', text_of(now))
return expire_due(KEYS[1], KEYS[2], KEYS[3], now)
