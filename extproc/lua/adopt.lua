#!lua flags=allow-oom
-- adopt: says that the caller's instance is alive, and which dead ones' rows the caller is to write into its journal.
-- One caller at a time adopts an outbox; it comes back to do so, or loses it to another.
--
-- KEYS  1 outboxes  2 adopters  3 the caller's outbox
-- ARGV  1 the caller, without white space  2 ms after which an instance that was not heard of is dead, and a claim over
--
-- Returns the outboxes of dead instances that are the caller's now.

local outboxes, adopters, own = KEYS[1], KEYS[2], KEYS[3]
local caller, dead_after = ARGV[1], integer(ARGV[2])
local now = now_ms()
redis.call('ZADD', outboxes, text_of(now), own)
redis.call('PEXPIRE', own, OUTBOX_RETENTION_MS)

local adopted = {}
for _, outbox in ipairs(dead_outboxes(outboxes, now, dead_after)) do
  if redis.call('EXISTS', outbox) == 0 then
    redis.call('ZREM', outboxes, outbox)
    redis.call('HDEL', adopters, outbox)
  else
    local claim = redis.call('HGET', adopters, outbox) or ' 0'
    local owner, until_ms = string.match(claim, '^(%S*) (%d+)$')
    if owner == caller or tonumber(until_ms) <= now then
      redis.call('HSET', adopters, outbox, caller .. ' ' .. text_of(now + dead_after))
      adopted[#adopted + 1] = outbox
    end
  end
end
return adopted
