-- Each budget in its current period, in its own unit: what is left, how fast it goes, and when it will be gone.
WITH recent AS (
  -- Every budget in use has a row a minute, so that a day finds them all, and reads two partitions at most.
  SELECT
    *,
    ROW_NUMBER() OVER (PARTITION BY budget_id ORDER BY ts DESC) AS age
  FROM ${dataset}.budget_snapshots
  WHERE ts > TIMESTAMP_SUB(CURRENT_TIMESTAMP(), INTERVAL 1 DAY)
),
latest AS (
  SELECT *
  FROM recent
  WHERE age = 1 AND (resets_at IS NULL OR resets_at > CURRENT_TIMESTAMP())
),
last_hour AS (
  -- A period that began within the hour is compared with its own first row, never with the period before.
  SELECT
    recent.budget_id,
    MIN(recent.posted) AS posted,
    TIMESTAMP_DIFF(MAX(recent.ts), MIN(recent.ts), MICROSECOND) / 3600e6 AS hours
  FROM recent
  JOIN latest ON latest.budget_id = recent.budget_id
  WHERE
    recent.ts >= TIMESTAMP_SUB(latest.ts, INTERVAL 1 HOUR)
    AND (recent.resets_at = latest.resets_at OR latest.resets_at IS NULL)
  GROUP BY recent.budget_id
),
burn AS (
  SELECT
    latest.ts,
    latest.budget_id,
    latest.scope,
    latest.period,
    latest.unit,
    latest.mode,
    latest.limit_amount,
    latest.posted,
    latest.pending,
    latest.limit_amount - latest.posted - latest.pending AS left_amount,
    latest.resets_at,
    SAFE_DIVIDE(latest.posted - last_hour.posted, last_hour.hours) AS speed_per_hour
  FROM latest
  JOIN last_hour ON last_hour.budget_id = latest.budget_id
),
projected AS (
  SELECT
    *,
    -- Gone already is gone at the last look. A total that would last for ten years has no date worth naming.
    CASE WHEN left_amount <= 0 THEN 0 ELSE SAFE_DIVIDE(left_amount, speed_per_hour) * 3600 END AS lasts_s,
    COALESCE(TIMESTAMP_DIFF(resets_at, ts, MICROSECOND) / 1e6, 10 * 365 * 86400e0) AS resets_s
  FROM burn
)
SELECT
  ts,
  budget_id,
  scope,
  period,
  unit,
  mode,
  limit_amount,
  posted,
  pending,
  left_amount,
  resets_at,
  speed_per_hour,
  -- NULL where it resets before, or where nothing is spent.
  CASE WHEN lasts_s < resets_s THEN TIMESTAMP_ADD(ts, INTERVAL CAST(lasts_s AS INT64) SECOND) END AS exhausted_at
FROM projected
