-- Streams that were paid for and did not end well, on each day (UTC): cut, left by the caller, broken by the provider.
SELECT
  DATE(ts) AS day,
  outcome,
  service,
  team,
  `user`,
  model,
  COUNT(*) AS requests,
  SUM(completion_tokens) AS completion_tokens,
  SUM(cost_nanousd) AS cost_nanousd,
  SUM(cost_nanousd) / 1e9 AS usd
FROM ${dataset}.usage
WHERE stream AND outcome IN ('cut', 'client_gone', 'upstream_error')
GROUP BY day, outcome, service, team, `user`, model
