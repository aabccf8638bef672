#!lua flags=allow-oom
-- settle: posts what a request really cost and releases its hold, once. The cost may exceed the hold and the limit:
-- usage is a fact. It may run without free memory, since it leaves less behind than it found, but for a row of 1 KB.
--
-- Where Redis lost the hold, the cost is posted to the windows that the caller brings. Where the hold expired, its
-- checkpoint was posted already: the cost takes that figure's place.
--
-- KEYS  1 hold  2 due  3 orphans  4 windows' index  5 outboxes  6 the instance's outbox  7.. windows
-- ARGV  1, 2 actual nanousd, tokens  3 the request's usage row, or empty  4.. windows in JSON
--
-- Returns 1, or 0 where it was settled before.

local key, due, orphans, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local actual = { nanousd = integer(ARGV[1]), tokens = integer(ARGV[2]) }
local windows = read_windows(7, 4)

local hold = read_hold(key)
if hold.state == 'settled' then
  return 0
elseif hold.state == 'open' then
  post(hold, actual, negative(hold.held), -1)
  drop_empty(hold, index)
elseif hold.state == 'expired' then
  local difference = { nanousd = actual.nanousd - hold.used.nanousd, tokens = actual.tokens - hold.used.tokens }
  -- Where the checkpoint was nothing, its window may have been dropped as empty.
  for _, window in ipairs(windows) do
    if hold.used[window.unit] == 0 and actual[window.unit] > 0 then
      describe(index, window)
    end
  end
  post(hold, difference, { nanousd = 0, tokens = 0 }, 0)
  drop_empty(hold, index)
else
  for _, window in ipairs(windows) do
    if actual[window.unit] > 0 then
      add(window.key, 'posted', actual[window.unit])
      describe(index, window)
    end
  end
end

-- The row is on the instance's disk too, which may be memory that dies with it. One that a usage store has already, since
-- the settlement was late, would never be taken out again.
if ARGV[3] ~= '' and not hold.stored then
  local outboxes, outbox = KEYS[5], KEYS[6]
  local rows = redis.call('HLEN', outbox)
  if rows < MAX_OUTBOX_ROWS then
    redis.call('HSET', outbox, key, ARGV[3])
  end
  if rows == 0 then
    redis.call('PEXPIRE', outbox, OUTBOX_RETENTION_MS)
    redis.call('ZADD', outboxes, text_of(now_ms()), outbox)
  end
end

-- Whoever settles also writes the usage record, so the orphan's is not needed any more.
redis.call('HDEL', orphans, key)
redis.call('ZREM', due, key)
redis.call('DEL', key)
redis.call('HSET', key, 'state', 'settled')
redis.call('PEXPIRE', key, SETTLED_RETENTION_MS)
return 1
