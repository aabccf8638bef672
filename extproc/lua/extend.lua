#!lua
-- extend: records what a request has used, and raises what it holds as far as every hard budget allows.
-- Both are absolute figures, so that a repeat changes nothing.
--
-- KEYS  1 hold  2 due  3.. windows
-- ARGV  1, 2 used nanousd, tokens  3, 4 target nanousd, tokens  5 ttl in ms  6.. windows in JSON
--
-- Returns  HELD nanousd tokens                            what is held now, as much as was asked
--          LIMITED nanousd tokens i posted pending now    less than was asked, because of the i-th window's budget
--          GONE                                           there is no open hold

local key, due = KEYS[1], KEYS[2]
local used = { nanousd = integer(ARGV[1]), tokens = integer(ARGV[2]) }
local target = { nanousd = integer(ARGV[3]), tokens = integer(ARGV[4]) }
local ttl = integer(ARGV[5])
local windows = read_windows(3, 6)

local hold = read_hold(key)
if hold.state ~= 'open' then
  return { 'GONE' }
end

local room = {}
local tightest = {}
for i, window in ipairs(windows) do
  if window.mode == 'hard' then
    local posted, pending = figures(window.key)
    local left = math.max(window.limit - posted - pending, 0)
    if not room[window.unit] or left < room[window.unit] then
      room[window.unit], tightest[window.unit] = left, i
    end
  end
end

-- Where both units give less than asked, the one that covers the smaller part of what was used is what ends the answer.
local more = {}
local limiting, least_covered = 0, math.huge
for _, unit in ipairs(UNITS) do
  more[unit] = math.max(target[unit] - hold.held[unit], 0)
  if room[unit] and room[unit] < more[unit] then
    more[unit] = room[unit]
    local covered = (hold.held[unit] + more[unit]) / math.max(used[unit], 1)
    if covered < least_covered then
      limiting, least_covered = tightest[unit], covered
    end
  end
end

post(hold, { nanousd = 0, tokens = 0 }, more, 0)
for _, unit in ipairs(UNITS) do
  add(key, unit, more[unit])
  if used[unit] > hold.used[unit] then
    redis.call('HSET', key, 'used_' .. unit, text_of(used[unit]))
  end
end
local now = now_ms()
redis.call('ZADD', due, text_of(now + ttl), key)

local held_nanousd, held_tokens = hold.held.nanousd + more.nanousd, hold.held.tokens + more.tokens
if limiting == 0 then
  return { 'HELD', held_nanousd, held_tokens }
end
local posted, pending = figures(windows[limiting].key)
return { 'LIMITED', held_nanousd, held_tokens, limiting, posted, pending, now }
