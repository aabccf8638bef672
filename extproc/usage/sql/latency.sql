-- How long answers took on each day (UTC). Only those that came whole: one that broke off early would look fast.
SELECT
  DATE(ts) AS day,
  provider,
  model,
  COUNT(*) AS requests,
  APPROX_QUANTILES(duration_ms, 100)[OFFSET(50)] AS duration_p50_ms,
  APPROX_QUANTILES(duration_ms, 100)[OFFSET(95)] AS duration_p95_ms,
  APPROX_QUANTILES(duration_ms, 100)[OFFSET(99)] AS duration_p99_ms,
  -- An answer without a first event has no ttft_ms, and does not count here.
  APPROX_QUANTILES(ttft_ms, 100)[SAFE_OFFSET(50)] AS ttft_p50_ms,
  APPROX_QUANTILES(ttft_ms, 100)[SAFE_OFFSET(95)] AS ttft_p95_ms,
  APPROX_QUANTILES(ttft_ms, 100)[SAFE_OFFSET(99)] AS ttft_p99_ms,
  APPROX_QUANTILES(overhead_us, 100)[OFFSET(50)] AS overhead_p50_us,
  APPROX_QUANTILES(overhead_us, 100)[OFFSET(95)] AS overhead_p95_us,
  APPROX_QUANTILES(overhead_us, 100)[OFFSET(99)] AS overhead_p99_us
FROM ${dataset}.usage
WHERE outcome = 'ok' AND attempts > 0
GROUP BY day, provider, model
