#!lua flags=allow-oom
-- stored: a usage store has these requests' rows, so that nothing keeps them any more: neither the caller's outbox nor
-- that of a dead instance, whose rows the caller adopted.
--
-- KEYS  1 outboxes  2 the caller's outbox  3.. holds
-- ARGV  1 ms after which an instance that was not heard of is dead
--
-- Returns how many rows were dropped.

local outboxes, own = KEYS[1], KEYS[2]
local dead = dead_outboxes(outboxes, now_ms(), integer(ARGV[1]))

local dropped = 0
for i = 3, #KEYS do
  local hold = KEYS[i]
  local found = redis.call('HDEL', own, hold)
  if found == 0 then
    for _, outbox in ipairs(dead) do
      found = found + redis.call('HDEL', outbox, hold)
    end
    -- The row was faster than its settlement, which would put it into the outbox for good. Not where the hold expired:
    -- what was stored may be the orphan's row, and the request's own is still to come.
    if redis.call('HGET', hold, 'state') == 'open' then
      redis.call('HSET', hold, 'stored', 1)
    end
  end
  dropped = dropped + found
end
return dropped
