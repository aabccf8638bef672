-- Who was stopped on each day (UTC), by which budget or status: 429 is a budget's, 401 and 403 are an unknown caller's.
SELECT
  DATE(ts) AS day,
  budget_id,
  service,
  team,
  `user`,
  outcome,
  status,
  COUNT(*) AS requests,
  SUM(cost_nanousd) AS cost_nanousd,
  SUM(cost_nanousd) / 1e9 AS usd
FROM ${dataset}.usage
WHERE outcome IN ('refused', 'cut')
GROUP BY day, budget_id, service, team, `user`, outcome, status
