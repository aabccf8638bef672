"""Usage records for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from extproc.records import Outcome, UsageRecord, UsageSource

_RECORD = UsageRecord(
    request_id="r1",
    ts="2026-11-23T16:00:00.123Z",
    service="ranker@my-project.iam.gserviceaccount.com",
    user=None,
    team="search",
    requested_model="gpt-4o",
    provider="openai",
    model="gpt-4o-2024-08-06",
    route="gpt-4o",
    attempts=1,
    stream=True,
    status=200,
    outcome=Outcome.OK,
    prompt_tokens=1000,
    cached_prompt_tokens=200,
    completion_tokens=50,
    reasoning_tokens=0,
    usage_source=UsageSource.PROVIDER,
    cost_nanousd=2_750_000,
    price_version="genai-prices 0.2.3",
    ttft_ms=312,
    duration_ms=1543,
    overhead_us=480,
    budget_id="service/ranker@my-project.iam.gserviceaccount.com/day/usd",
)


def usage_record(request_id: str = "r1", **changes: Any) -> UsageRecord:
    """A plausible record, with changes."""
    return dataclasses.replace(_RECORD, request_id=request_id, **changes)
