#!lua
-- learn: moves a model's factor (billed tokens per counted token) towards one answer's.
--
-- KEYS  1 factors
-- ARGV  1 model  2 counted  3 billed  4 the factor, in parts per million, where nothing was learned yet
--
-- Returns the factor in parts per million.

local WEIGHT = 0.1 -- of one answer: about the last twenty count

local function clamp(ppm)
  return math.max(MIN_FACTOR_PPM, math.min(MAX_FACTOR_PPM, math.floor(ppm + 0.5)))
end

local counted, billed = integer(ARGV[2]), integer(ARGV[3])
if counted == 0 then
  error('nothing was counted')
end
local stored = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or ARGV[4])
local factor = clamp(stored + WEIGHT * (clamp(billed / counted * 1000000) - stored))
redis.call('HSET', KEYS[1], ARGV[1], text_of(factor))
return factor
