"""The hot path compiled by mypyc, where TOLLGATE_COMPILE=1 asks for it; docs/decisions/0016 says why."""

from __future__ import annotations

import os

from setuptools import Extension, setup

# What runs for every request and every streamed event. All of it runs uncompiled as well, which is what is deployed.
HOT_PATH = (
    "extproc/allowance.py",
    "extproc/budget.py",
    "extproc/dialects/anthropic/calls.py",
    "extproc/dialects/anthropic/prompts.py",
    "extproc/dialects/fields.py",
    "extproc/dialects/gemini/calls.py",
    "extproc/dialects/gemini/prompts.py",
    "extproc/dialects/openai_chat/calls.py",
    "extproc/dialects/openai_chat/prompts.py",
    "extproc/dialects/openai_parts.py",
    "extproc/dialects/openai_responses/calls.py",
    "extproc/dialects/openai_responses/prompts.py",
    "extproc/endpoints.py",
    "extproc/envoy.py",
    "extproc/exchange.py",
    "extproc/headers.py",
    "extproc/intake.py",
    "extproc/itinerary.py",
    "extproc/metering.py",
    "extproc/models.py",
    "extproc/plan.py",
    "extproc/redaction.py",
    "extproc/routing.py",
    "extproc/session.py",
    "extproc/settling.py",
    "extproc/sse.py",
    "extproc/target.py",
    "extproc/tracing.py",
    "extproc/transports/wire/connection.py",
    "extproc/transports/wire/floods.py",
    "extproc/transports/wire/frames.py",
    "extproc/transports/wire/grpc.py",
    "extproc/transports/wire/server.py",
    "extproc/transports/wire/streams.py",
)


def _extensions() -> list[Extension]:
    if os.environ.get("TOLLGATE_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415 — where nothing is compiled it need not be installed

    return mypycify(["--config-file", "pyproject.toml", *HOT_PATH], opt_level="2", group_name="extproc.hot")


setup(ext_modules=_extensions())
