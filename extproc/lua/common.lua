-- What the ledger's scripts share. Python puts this, the clock and the bounds of extproc/limits.py in front of each.
--
-- Every key begins with one hash tag, so that Redis Cluster keeps them in one slot:
--   {ns}:hold:<request id>      hash    a request: state open | expired | settled; while open what it holds, per unit,
--                                       what it used at its last checkpoint, its note, and its windows
--   {ns}:window:<budget>:<start> hash   a budget's window: posted, pending, how many holds are `open` in it, and
--                                       `window`, its description in JSON; gone when all three are zero
--   {ns}:due                    zset    open holds by the time they expire
--   {ns}:windows                zset    windows' keys by the time that Redis forgets them
--   {ns}:orphans                hash    expired holds that no usage record was written for yet
--   {ns}:factors                hash    learned factor per model, in parts per million
--   {ns}:outbox:<instance>      hash    usage rows of settled requests, by their holds' keys, until a usage store has them
--   {ns}:outboxes               zset    outboxes by the time that their instance was last heard of
--   {ns}:adopters               hash    who copies a dead instance's outbox, and until when it is nobody else's to do
--
-- Lua's numbers are doubles: whole below 2^53, and written with %.0f, since tostring rounds to 14 digits.

local MAX_INTEGER = 2 ^ 53 - 1
local UNITS = { 'nanousd', 'tokens' }

local function integer(text)
  local number = tonumber(text)
  if not number or number < 0 or number > MAX_INTEGER or number % 1 ~= 0 then
    error('not a whole number from 0 to 2^53: ' .. tostring(text))
  end
  return number
end

local function text_of(number)
  return string.format('%.0f', number)
end

local function add(key, field, figure)
  if figure ~= 0 then
    redis.call('HINCRBY', key, field, text_of(figure))
  end
end

local function figures(key)
  local stored = redis.call('HMGET', key, 'posted', 'pending')
  return tonumber(stored[1] or 0), tonumber(stored[2] or 0)
end

-- The windows of KEYS[first..], described by ARGV[offset..] in the same order.
local function read_windows(first, offset)
  local windows = {}
  for i = first, #KEYS do
    local text = ARGV[offset + i - first]
    local window = cjson.decode(text)
    windows[#windows + 1] = {
      key = KEYS[i],
      text = text,
      id = window.budget.id,
      unit = window.budget.unit,
      mode = window.budget.mode,
      limit = window.budget.limit,
      start_ms = window.start_ms,
      end_ms = window.end_ms,
    }
  end
  return windows
end

-- After the first figure of a window: says what it is of, and when Redis may forget it. That is an absolute time, so
-- however often it is set, nothing is renewed. A window that is long over is gone again at once.
local function describe(index, window)
  if redis.call('HGET', window.key, 'window') == window.text then
    return
  end
  redis.call('HSET', window.key, 'window', window.text)
  if window.end_ms == 0 then
    redis.call('ZADD', index, '+inf', window.key)
  else
    local forgotten_ms = text_of(window.end_ms + WINDOW_RETENTION_MS)
    redis.call('PEXPIREAT', window.key, forgotten_ms)
    redis.call('ZADD', index, forgotten_ms, window.key)
  end
end

local function read_hold(key)
  local stored = redis.call('HMGET', key, 'state', 'nanousd', 'tokens', 'used_nanousd', 'used_tokens', 'windows', 'note',
    'stored')
  return {
    state = stored[1],
    held = { nanousd = tonumber(stored[2] or 0), tokens = tonumber(stored[3] or 0) },
    used = { nanousd = tonumber(stored[4] or 0), tokens = tonumber(stored[5] or 0) },
    windows = stored[6],
    note = stored[7],
    stored = stored[8],
  }
end

-- Adds to every window that the hold is in. A window deleted by hand stays deleted: a part of it would be wrong.
local function post(hold, posted, pending, open)
  for _, window in ipairs(cjson.decode(hold.windows)) do
    local key, unit = window[1], window[2]
    if redis.call('EXISTS', key) == 1 then
      add(key, 'posted', posted[unit])
      add(key, 'pending', pending[unit])
      add(key, 'open', open)
    end
  end
end

-- Of instances that were not heard of for so long: those longest dead.
local function dead_outboxes(outboxes, now, dead_after)
  return redis.call('ZRANGEBYSCORE', outboxes, '-inf', text_of(now - dead_after), 'LIMIT', 0, MAX_DEAD_OUTBOXES)
end

local function negative(amount)
  return { nanousd = -amount.nanousd, tokens = -amount.tokens }
end

-- Drops the hold's windows in which nothing is posted or held: whoever only causes refusals and failures must not fill
-- Redis. An open hold keeps its windows, even where it holds nothing in them.
local function drop_empty(hold, index)
  for _, window in ipairs(cjson.decode(hold.windows)) do
    local key = window[1]
    local stored = redis.call('HMGET', key, 'posted', 'pending', 'open')
    if tonumber(stored[1] or 0) == 0 and tonumber(stored[2] or 0) == 0 and tonumber(stored[3] or 0) == 0 then
      redis.call('DEL', key)
      redis.call('ZREM', index, key)
    end
  end
end

-- Expires up to SWEEP_BATCH holds that are due: posts their last checkpoint, releases the rest, and leaves an orphan.
-- Returns how many were due.
local function expire_due(due, orphans, index, now)
  local keys = redis.call('ZRANGEBYSCORE', due, '-inf', text_of(now), 'LIMIT', 0, SWEEP_BATCH)
  for _, key in ipairs(keys) do
    local hold = read_hold(key)
    if hold.state == 'open' then
      local used = hold.used
      post(hold, used, negative(hold.held), -1)
      drop_empty(hold, index)
      local used_nanousd, used_tokens = text_of(used.nanousd), text_of(used.tokens)
      redis.call('HSET', orphans, key, used_nanousd .. ' ' .. used_tokens .. ' ' .. hold.note)
      redis.call('HSET', key, 'state', 'expired')
      redis.call('HDEL', key, 'nanousd', 'tokens', 'note', 'over')
      -- As long as a closed window: a settlement that waited on a disk must find which figure it takes the place of.
      redis.call('PEXPIRE', key, WINDOW_RETENTION_MS)
    end
    redis.call('ZREM', due, key)
  end
  return #keys
end
