-- What each day (UTC) cost, by who and by model. usd is for people: sums are made of cost_nanousd.
SELECT
  DATE(ts) AS day,
  service,
  team,
  `user`,
  model,
  COUNT(*) AS requests,
  SUM(prompt_tokens) AS prompt_tokens,
  SUM(cached_prompt_tokens) AS cached_prompt_tokens,
  SUM(completion_tokens) AS completion_tokens,
  SUM(reasoning_tokens) AS reasoning_tokens,
  SUM(cost_nanousd) AS cost_nanousd,
  SUM(cost_nanousd) / 1e9 AS usd
FROM ${dataset}.usage
GROUP BY day, service, team, `user`, model
