-- What the providers' caches took off the bill, on each day (UTC). Writing to a cache may cost more than it saves: < 0.
SELECT
  DATE(ts) AS day,
  provider,
  model,
  COUNT(*) AS requests,
  SUM(prompt_tokens) AS prompt_tokens,
  SUM(cached_prompt_tokens) AS cached_prompt_tokens,
  SUM(cache_savings_nanousd) AS cache_savings_nanousd,
  SUM(cache_savings_nanousd) / 1e9 AS usd
FROM ${dataset}.usage
WHERE attempts > 0
GROUP BY day, provider, model
HAVING SUM(cached_prompt_tokens) > 0 OR SUM(cache_savings_nanousd) <> 0
