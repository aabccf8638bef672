#!lua
-- hold: holds an amount under every budget of a request, or refuses and holds nothing.
-- The first line lets Redis check for memory and a writable server before the script runs, not half-way.
--
-- KEYS  1 hold  2 due  3 orphans  4 windows' index  5.. windows
-- ARGV  1, 2 wanted nanousd, tokens  3, 4 least  5, 6 used: the first checkpoint  7 ttl in ms  8 note
--       9.. windows in JSON
--
-- Returns  HELD nanousd tokens over              granted; `over` is soft budgets past their limit, in JSON, or empty
--          REPEATED nanousd tokens over windows  the grant that this id has, and its windows in JSON
--          REFUSED i posted pending now          by the i-th window's budget
--          CLOCK now                             by Redis's clock a window is over or not begun: nothing was done

local key, due, orphans, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local wanted = { nanousd = integer(ARGV[1]), tokens = integer(ARGV[2]) }
local least = { nanousd = integer(ARGV[3]), tokens = integer(ARGV[4]) }
local used = { nanousd = integer(ARGV[5]), tokens = integer(ARGV[6]) }
local ttl, note = integer(ARGV[7]), ARGV[8]
local windows = read_windows(5, 9)

local stored = read_hold(key)
if stored.state == 'open' then
  local texts = {}
  for i, window in ipairs(cjson.decode(stored.windows)) do
    texts[i] = redis.call('HGET', window[1], 'window')
  end
  local over = redis.call('HGET', key, 'over')
  return { 'REPEATED', stored.held.nanousd, stored.held.tokens, over, texts }
elseif stored.state then
  return redis.error_reply('CLOSED this request id is already ' .. stored.state)
end

local now = now_ms()
for _, window in ipairs(windows) do
  if now < window.start_ms or (window.end_ms > 0 and now >= window.end_ms) then
    return { 'CLOCK', now }
  end
end

-- A dead processor's holds must not refuse a live caller.
expire_due(due, orphans, index, now)

local over = {}
for i, window in ipairs(windows) do
  local posted, pending = figures(window.key)
  local left = window.limit - posted - pending
  if window.mode == 'hard' then
    if left < least[window.unit] then
      return { 'REFUSED', i, posted, pending, now }
    end
    wanted[window.unit] = math.min(wanted[window.unit], math.max(left, 0))
  elseif window.mode == 'soft' and left <= 0 then
    over[#over + 1] = window.id
  end
end

local places = {}
for i, window in ipairs(windows) do
  add(window.key, 'pending', wanted[window.unit])
  add(window.key, 'open', 1)
  describe(index, window)
  places[i] = { window.key, window.unit }
end
local over_text = #over > 0 and cjson.encode(over) or ''
redis.call('HSET', key, 'state', 'open', 'nanousd', text_of(wanted.nanousd), 'tokens', text_of(wanted.tokens),
  'used_nanousd', text_of(used.nanousd), 'used_tokens', text_of(used.tokens),
  'windows', cjson.encode(places), 'over', over_text, 'note', note)
redis.call('ZADD', due, text_of(now + ttl), key)
return { 'HELD', wanted.nanousd, wanted.tokens, over_text }
