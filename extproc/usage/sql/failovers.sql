-- Who answered after a failed attempt, on each day (UTC). A second attempt may have gone to the same provider.
WITH answers AS (
  SELECT
    DATE(ts) AS day,
    requested_model,
    provider,
    model,
    COUNTIF(attempts > 1 AND outcome IN ('ok', 'cut', 'client_gone')) AS requests,
    COUNT(*) AS sent
  FROM ${dataset}.usage
  WHERE attempts > 0
  GROUP BY day, requested_model, provider, model
),
shares AS (
  -- Of all requests for that model, failed ones too: the share is what of them this provider saved.
  SELECT
    *,
    requests / SUM(sent) OVER (PARTITION BY day, requested_model) AS share
  FROM answers
)
SELECT day, requested_model, provider, model, requests, share
FROM shares
WHERE requests > 0
