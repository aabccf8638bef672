-- Redis's clock is the ledger's clock: processors' clocks differ, this one is the same for all of them.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
