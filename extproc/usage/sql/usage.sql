-- One row a request. The log may hold more: a row that was sent twice, and an orphan's beside the request's own.
-- Both kinds have the ts of their request. It is in PARTITION BY so that a filter on ts reaches the table's partitions.
SELECT *
FROM ${dataset}.usage_log
WHERE TRUE
QUALIFY ROW_NUMBER() OVER (PARTITION BY request_id, ts ORDER BY orphan, duration_ms) = 1
