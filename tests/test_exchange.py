"""The state machine of one request: every pair of its table, and every way in which a request can end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from extproc import events, limits
from extproc.dialects.openai_chat import OpenAIChat
from extproc.errors import Forbidden, ProtocolViolation, TollgateError, Unauthenticated, Unavailable
from extproc.events import (
    Command,
    ContinueRequest,
    ContinueResponse,
    CountPrompt,
    DropTrailers,
    ExtendLease,
    ForwardChunk,
    ForwardRequest,
    HoldAnswered,
    KeysRefreshed,
    Learn,
    LeaseAnswered,
    PlaceHold,
    PromptCounted,
    RefreshKeys,
    RefreshSecret,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseHeaders,
    ResponseTrailers,
    SetTimer,
    Settle,
    TimerFired,
    WriteRecord,
)
from extproc.exchange import TRANSITIONS, State
from extproc.headers import CALLERS_ONLY, FLAGS
from extproc.itinerary import Itinerary
from extproc.pricing import PriceBook
from extproc.records import (
    NOTHING,
    Amount,
    BudgetWindow,
    Hold,
    Lease,
    Outcome,
    PriceRule,
    Settlement,
    Target,
    Unit,
    UsageSource,
)
from tests.exchanges import (
    ADMISSION_MS,
    BUDGET_ID,
    CALLER,
    DEAR,
    DONE,
    FIRST_BYTE_MS,
    HEARTBEAT_MS,
    INPUT_NANOUSD,
    JSON,
    LEASE,
    MESSAGES,
    OUTPUT_NANOUSD,
    PROMPT,
    REQUEST_ID,
    SAMPLES,
    SECRET,
    SSE,
    TOKEN,
    Talk,
    answer,
    at,
    body,
    cost,
    delta,
    event,
    figures,
    forwarded,
    refusal,
    request_headers,
    usage,
    words,
)

UNCHANGED = ForwardChunk()
DIALECT = OpenAIChat()
ENDED_EARLY = b"The provider's stream ended early."


def kinds(commands: list[Command]) -> list[type[Command]]:
    return [type(command) for command in commands]


# The table ------------------------------------------------------------------------------------------------------------

LEGAL = {
    State.START: {"RequestHeaders", "ResponseHeaders", "Closed"},
    State.IDENTIFYING: {"KeysRefreshed", "TimerFired", "Closed"},
    State.BODY: {"RequestBody", "ResponseHeaders", "TimerFired", "Closed"},
    State.COUNTING: {"PromptCounted", "TimerFired", "Closed"},
    State.HOLDING: {"HoldAnswered", "TimerFired", "Closed"},
    State.ABANDONED: {"HoldAnswered", "TimerFired", "Closed"},
    State.SENT: {"ResponseHeaders", "LeaseAnswered", "TimerFired", "Closed"},
    State.STREAMING: {"ResponseBody", "ResponseTrailers", "LeaseAnswered", "TimerFired", "Closed"},
    State.WAITING: {"ResponseBody", "ResponseTrailers", "LeaseAnswered", "TimerFired", "Closed"},
    State.ANSWERING: {"ResponseBody", "ResponseTrailers", "LeaseAnswered", "TimerFired", "Closed"},
    State.FAILING: {"ResponseBody", "ResponseTrailers", "LeaseAnswered", "TimerFired", "Closed"},
    State.CUTTING: {"ResponseBody", "ResponseTrailers", "LeaseAnswered", "TimerFired", "Closed"},
    State.PASSING: {"ResponseBody", "Closed"},
    State.DONE: {
        "ResponseBody",
        "ResponseTrailers",
        "KeysRefreshed",
        "PromptCounted",
        "LeaseAnswered",
        "TimerFired",
        "Closed",
    },
}


def test_every_state_and_every_event_is_in_the_matrix() -> None:
    assert set(LEGAL) == set(State)
    assert set(SAMPLES) == {kind.__name__ for kind in events.Event.__args__}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("state", list(State), ids=lambda state: str(state.name))
def test_each_event_in_each_state_has_a_row_or_breaks_the_order(state: State, name: str) -> None:
    sample = SAMPLES[name]
    assert ((state, type(sample)) in TRANSITIONS) == (name in LEGAL[state])
    talk = at(state)
    if name in LEGAL[state]:
        talk.feed(sample)
    else:
        with pytest.raises(ProtocolViolation, match=rf"{name} in {state.name}"):
            talk.exchange.handle(sample)


@pytest.mark.parametrize("state", list(State), ids=lambda state: str(state.name))
def test_after_a_broken_order_the_close_still_accounts_for_the_request(state: State) -> None:
    talk = at(state)
    with pytest.raises(ProtocolViolation):
        talk.exchange.handle(RequestHeaders(request_headers(), True) if state is not State.START else KeysRefreshed())
    talk.close()
    granted = state not in (State.START, State.IDENTIFYING, State.BODY, State.COUNTING, State.HOLDING, State.ABANDONED)
    assert len(talk.all(Settle)) == (granted and state not in (State.PASSING, State.DONE))
    assert len(talk.records) == (state not in (State.START, State.PASSING))


# Refusals before the body ---------------------------------------------------------------------------------------------


def test_a_request_without_an_id_is_not_taken() -> None:
    talk = Talk()
    with pytest.raises(ProtocolViolation):
        talk.ask(x_request_id="")


REFUSED_HEADERS: dict[str, tuple[Any, int, str, str | None]] = {
    "another path": ({"path": "/v1/files"}, 404, "unknown_url", None),
    "a path with more behind it": ({"path": "/v1/chat/completions/"}, 404, "unknown_url", None),
    "another method": ({"method": "GET"}, 405, "method_not_allowed", None),
    "no content type": ({"content_type": ""}, 415, "unsupported_media_type", "content-type"),
    "a form": ({"content_type": "multipart/form-data"}, 415, "unsupported_media_type", "content-type"),
    "a compressed body": ({"content_encoding": "gzip"}, 415, "unsupported_media_type", "content-encoding"),
    "too long": ({"content_length": str(limits.MAX_REQUEST_BYTES + 1)}, 413, "request_too_large", None),
    "far too long": ({"content_length": "9" * 5_000}, 413, "request_too_large", None),
}


@pytest.mark.parametrize(("changed", "status", "code", "param"), REFUSED_HEADERS.values(), ids=REFUSED_HEADERS)
def test_headers_that_are_refused(changed: Any, status: int, code: str, param: str | None) -> None:
    talk = Talk()
    assert kinds(talk.ask(**changed)) == [Reply, WriteRecord]
    assert talk.one(Reply).status == talk.record.status == status
    assert (talk.error["code"], talk.error["param"]) == (code, param)
    assert talk.one(Reply).details == code
    assert (talk.record.outcome, talk.record.request_id, talk.record.attempts) == (Outcome.REFUSED, REQUEST_ID, 0)


@pytest.mark.parametrize("length", ["0", str(limits.MAX_REQUEST_BYTES), "-1", "²", ""])
def test_a_content_length_that_is_not_too_long_is_left_to_envoy(length: str) -> None:
    talk = Talk()
    assert talk.ask(content_length=length) == [ContinueRequest()]


def test_a_request_without_a_body_is_refused() -> None:
    talk = Talk()
    talk.ask(end=True)
    assert talk.one(Reply).status == 400


@pytest.mark.parametrize(
    ("name", "status"), [("authorization", 401), ("content-type", 400), ("x-llm-provider", 400)], ids=str
)
def test_a_repeated_header_that_decides_something_is_refused(name: str, status: int) -> None:
    talk = Talk()
    talk.ask((name, "one"), (name, "two"))
    assert (talk.one(Reply).status, talk.error["code"], talk.error["param"]) == (status, "repeated_header", name)


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (Unauthenticated("Who?"), 401, ("www-authenticate", "Bearer")),
        (Forbidden("Not you."), 403, None),
        (Unavailable("The keys are too old."), 503, ("retry-after", "1")),
        (Unavailable("Later.", retry_after_s=7), 503, ("retry-after", "7")),
    ],
    ids=["401", "403", "503", "503 with a time"],
)
def test_a_caller_that_is_refused(error: TollgateError, status: int, header: tuple[str, str] | None) -> None:
    talk = Talk()
    talk.callers.error = error
    assert kinds(talk.ask()) == [Reply, WriteRecord]
    reply = talk.one(Reply)
    assert (reply.status, talk.error["message"]) == (status, error.message)
    assert reply.headers == (JSON[0], ("x-request-id", REQUEST_ID), *([header] if header else []))
    assert talk.record.service is None


def test_a_wrong_method_names_the_right_one() -> None:
    talk = Talk()
    talk.ask(method="DELETE")
    assert ("allow", "POST") in talk.one(Reply).headers


def test_identity_is_asked_with_the_headers_as_they_are() -> None:
    talk = Talk()
    talk.ask(("x-tollgate-user", "u@x.example"))
    assert talk.callers.asked == [((TOKEN,), "u@x.example")]
    talk = Talk()
    talk.ask(authorization="")
    assert talk.callers.asked == [((), None)]


def test_a_gateway_that_is_not_ready_refuses_before_it_looks_at_the_caller() -> None:
    talk = Talk(unready=lambda: "Redis cannot be used")
    talk.ask()
    assert talk.one(Reply).status == 503
    assert "Redis cannot be used" in talk.error["message"]
    assert talk.callers.asked == []


@pytest.mark.parametrize("lacking", [None, "Redis cannot be used"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_health_is_answered_without_a_token_or_a_record(lacking: str | None, method: str) -> None:
    talk = Talk(unready=lambda: lacking)
    talk.ask(method=method, path="/healthz?verbose", authorization="", end=True)
    reply = talk.one(Reply)
    assert reply.status == (503 if lacking else 200)
    assert orjson.loads(reply.body) == {"ready": lacking is None, "lacking": lacking}
    assert talk.commands == [reply]
    assert talk.exchange.done


# Keys -----------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_fetched_once_and_the_request_goes_on() -> None:
    talk = Talk()
    talk.callers.unknown_keys = 1
    assert talk.ask() == [RefreshKeys("https://issuer.test"), SetTimer(ADMISSION_MS)]
    assert talk.feed(KeysRefreshed()) == [ContinueRequest()]
    assert talk.feed(TimerFired()) == []
    assert talk.state is State.BODY


def test_the_end_of_the_headers_is_remembered_while_keys_are_fetched() -> None:
    talk = Talk()
    talk.callers.unknown_keys = 1
    talk.ask(end=True)
    talk.feed(KeysRefreshed())
    assert talk.one(Reply).status == 400


def test_a_key_that_stays_unknown_is_a_401() -> None:
    talk = Talk()
    talk.callers.unknown_keys = 2
    talk.ask()
    assert kinds(talk.feed(KeysRefreshed())) == [Reply, WriteRecord]
    assert talk.one(Reply).status == 401


# Refusals of the body -------------------------------------------------------------------------------------------------

REFUSED_BODIES: dict[str, tuple[bytes, int, str, str | None]] = {
    "no JSON": (b"{", 400, "invalid_json", None),
    "no messages": (b'{"model": "gpt-4o"}', 400, "missing_required_parameter", "messages"),
    "a wrong type": (body(stream="yes"), 400, "invalid_type", "stream"),
    "two spellings": (body(Stream=True), 400, "unknown_parameter", "Stream"),
    "a model that is not offered": (body(model="gpt-9"), 400, "model_not_found", "model"),
    "a model without a price": (body(model="priceless"), 400, "model_price_unknown", "model"),
    "a provider that cannot be reached": (body(model="elsewhere"), 503, "service_unavailable", None),
}


@pytest.mark.parametrize(("data", "status", "code", "param"), REFUSED_BODIES.values(), ids=REFUSED_BODIES)
def test_bodies_that_are_refused(data: bytes, status: int, code: str, param: str | None) -> None:
    talk = Talk()
    talk.ask()
    assert kinds(talk.feed(RequestBody(data, True))) == [Reply, WriteRecord]
    assert talk.one(Reply).status == talk.record.status == status
    assert (talk.error["code"], talk.error["param"]) == (code, param)
    assert (talk.record.outcome, talk.record.service) == (Outcome.REFUSED, CALLER.service)


def test_a_forced_provider_that_is_not_offered_is_refused() -> None:
    talk = Talk()
    talk.ask(("x-llm-provider", "anthropic"))
    talk.feed(RequestBody(body(), True))
    assert (talk.one(Reply).status, talk.error["code"]) == (400, "provider_not_found")


# Envoy's own refusals -------------------------------------------------------------------------------------------------


def test_a_request_that_envoy_refused_unseen_passes_without_a_record() -> None:
    talk = at(State.START)
    assert talk.answered(400) == [ContinueResponse()]
    assert talk.chunk(b"{}", end=True) == [UNCHANGED]
    assert talk.close() == []
    assert talk.exchange.done


def test_a_body_that_envoy_refused_is_recorded() -> None:
    talk = at(State.BODY)
    assert kinds(talk.answered(413)) == [ContinueResponse, WriteRecord]
    assert talk.chunk(b"{}", end=True) == [UNCHANGED]
    assert (talk.record.outcome, talk.record.status) == (Outcome.REFUSED, 413)
    assert talk.close() == []


# Counting the prompt --------------------------------------------------------------------------------------------------


def test_a_large_prompt_is_counted_outside() -> None:
    talk = Talk()
    text = "x" * limits.INLINE_COUNT_CHARS
    commands = talk.post(messages=[{"role": "user", "content": text}])
    assert commands == [CountPrompt(("user", text), "o200k_base"), SetTimer(ADMISSION_MS)]
    assert kinds(talk.feed(PromptCounted(1_000))) == [PlaceHold, SetTimer]
    assert talk.one(PlaceHold).ask.used == Amount(1_007 * INPUT_NANOUSD, 1_007)


def test_a_large_prompt_that_cannot_be_counted_is_refused() -> None:
    talk = at(State.COUNTING)
    assert kinds(talk.feed(PromptCounted(None))) == [Reply, WriteRecord]
    assert talk.one(Reply).status == talk.record.status == 503
    assert talk.all(PlaceHold) == []


def test_a_prompt_up_to_the_bound_is_counted_at_once() -> None:
    talk = Talk()
    talk.post(messages=[{"role": "user", "content": "x" * (limits.INLINE_COUNT_CHARS - len("user"))}])
    assert talk.state is State.HOLDING


# The hold -------------------------------------------------------------------------------------------------------------


def test_a_stream_asks_for_two_leases_and_at_least_one_token() -> None:
    talk = Talk()
    talk.post(stream=True)
    ask = talk.one(PlaceHold).ask
    assert (ask.ask, ask.least, ask.used) == (cost(2 * LEASE), cost(1), cost(0))
    assert (ask.request_id, [budget.id for budget in ask.budgets]) == (REQUEST_ID, [BUDGET_ID])


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        pytest.param({}, 1_000, id="a whole answer: the model's cap"),
        pytest.param({"max_tokens": 70}, 70, id="the caller's cap"),
        pytest.param({"max_tokens": 7_000}, 1_000, id="never above the model's"),
        pytest.param({"max_tokens": 70, "n": 3}, 210, id="of every choice"),
        pytest.param({"model": "o3", "stream": True}, 500, id="a stream of a reasoning model"),
    ],
)
def test_what_cannot_be_cut_is_held_for_whole(fields: dict[str, Any], tokens: int) -> None:
    talk = Talk()
    talk.post(**fields)
    ask = talk.one(PlaceHold).ask
    assert ask.ask == ask.least == cost(tokens)


def test_a_short_stream_asks_for_no_more_than_its_cap() -> None:
    talk = Talk()
    talk.post(stream=True, max_tokens=LEASE)
    assert talk.one(PlaceHold).ask.ask == cost(LEASE)


def test_a_web_search_is_held_for_and_billed() -> None:
    talk = Talk()
    talk.post(web_search_options={})
    search = talk.gate.prices.price(Target("openai", "gpt-4o"), None).web_search_nanousd
    ask = talk.one(PlaceHold).ask
    assert search > 0
    assert ask.ask == Amount(cost(1_000).nanousd + search, PROMPT + 1_000)
    talk.feed(HoldAnswered(Hold(REQUEST_ID, (), ask.ask)))
    talk.answered()
    talk.chunk(answer(usage=figures(PROMPT, 5)), end=True)
    assert talk.settlement.actual.nanousd == cost(5).nanousd + search


def test_the_note_is_the_record_of_a_request_whose_processor_died() -> None:
    talk = Talk()
    talk.post(stream=True)
    note = orjson.loads(talk.one(PlaceHold).ask.note)
    assert (note["request_id"], note["outcome"], note["status"]) == (REQUEST_ID, "upstream_error", 0)
    assert (note["prompt_tokens"], note["completion_tokens"], note["usage_source"]) == (PROMPT, 0, "counted")


def test_a_refused_hold_is_a_429_that_names_the_budget() -> None:
    talk = Talk()
    talk.post()
    budget = talk.one(PlaceHold).ask.budgets[0]
    assert kinds(talk.feed(HoldAnswered(refusal(budget, posted=budget.limit)))) == [Reply, WriteRecord]
    reply = talk.one(Reply)
    assert reply.status == 429
    assert ("retry-after", "3600") in reply.headers
    assert ("x-should-retry", "false") in reply.headers
    assert (talk.error["type"], talk.error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert BUDGET_ID in talk.error["message"]
    assert (talk.record.outcome, talk.record.budget_id) == (Outcome.REFUSED, BUDGET_ID)


def test_an_unanswered_hold_is_a_503_and_is_given_back() -> None:
    talk = Talk()
    talk.post()
    assert kinds(talk.feed(HoldAnswered(None))) == [Reply, WriteRecord, Settle]
    assert (talk.one(Reply).status, talk.record.outcome) == (503, Outcome.REFUSED)
    assert talk.settlement == Settlement(REQUEST_ID, (), NOTHING)


@pytest.mark.parametrize("left", [True, False], ids=["the caller left", "time ran out"])
@pytest.mark.parametrize("answered", ["granted", "refused", "unanswered"])
def test_a_hold_that_is_answered_too_late_is_given_back(left: bool, answered: str) -> None:
    talk = Talk()
    talk.post()
    early = talk.close() if left else talk.feed(TimerFired())
    assert kinds(early) == ([WriteRecord] if left else [Reply, WriteRecord])
    assert talk.record.outcome is (Outcome.CLIENT_GONE if left else Outcome.REFUSED)
    assert (talk.state, talk.exchange.done) == (State.ABANDONED, False)
    assert talk.close() == talk.feed(TimerFired()) == []
    ask = talk.one(PlaceHold).ask
    if answered == "granted":
        talk.hold(20)
        assert talk.settlement == Settlement(REQUEST_ID, talk.windows, NOTHING)
    elif answered == "refused":
        assert talk.feed(HoldAnswered(refusal(ask.budgets[0]))) == []
    else:
        talk.feed(HoldAnswered(None))
        assert talk.settlement == Settlement(REQUEST_ID, (), NOTHING)
    assert talk.exchange.done


@pytest.mark.parametrize("state", [State.IDENTIFYING, State.COUNTING, State.HOLDING], ids=lambda state: str(state.name))
def test_a_gateway_that_cannot_decide_in_time_says_so(state: State) -> None:
    talk = at(state)
    assert kinds(talk.feed(TimerFired())) == [Reply, WriteRecord]
    assert talk.one(Reply).status == talk.record.status == 503


@pytest.mark.parametrize(
    ("state", "late"),
    [(State.IDENTIFYING, KeysRefreshed()), (State.COUNTING, PromptCounted(1))],
    ids=["keys", "the count"],
)
@pytest.mark.parametrize("left", [True, False], ids=["the caller left", "time ran out"])
def test_answers_that_nobody_waits_for_any_more_change_nothing(state: State, late: Any, left: bool) -> None:
    talk = at(state)
    talk.close() if left else talk.feed(TimerFired())
    assert talk.feed(late) == []
    assert talk.all(PlaceHold) == []


# What is sent on ------------------------------------------------------------------------------------------------------


def sent_body(**fields: Any) -> dict[str, Any]:
    talk = Talk().sent(**fields)
    sent: dict[str, Any] = orjson.loads(talk.one(ForwardRequest).body)
    return sent


def test_the_request_is_sent_with_its_route_and_length_and_without_the_callers_credentials() -> None:
    talk = Talk().sent()
    sent = talk.one(ForwardRequest)
    assert dict(sent.set_headers) == {
        "x-tollgate-internal-route": "openai",
        "content-type": "application/json",
        "content-length": str(len(sent.body)),
    }
    assert sent.remove_headers == CALLERS_ONLY
    assert "authorization" in sent.remove_headers
    assert talk.commands[-1] == SetTimer(HEARTBEAT_MS)


@pytest.mark.parametrize("asked", [{}, {"stream_options": {"include_usage": False}}], ids=["not asked", "refused"])
def test_usage_is_forced_on(asked: dict[str, Any]) -> None:
    assert sent_body(stream=True, **asked)["stream_options"] == {"include_usage": True}
    assert "stream_options" not in sent_body()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"stream": True}, {}, id="a stream that can be cut needs none"),
        pytest.param({"stream": True, "max_tokens": 5_000}, {"max_tokens": 1_000}, id="the caller's is clamped"),
        pytest.param({}, {"max_completion_tokens": 1_000}, id="what is held for is enforced"),
        pytest.param({"stream": True, "model": "o3"}, {"max_completion_tokens": 500}, id="so are thoughts"),
        pytest.param({"max_completion_tokens": 30}, {"max_completion_tokens": 30}, id="the caller's own"),
    ],
)
def test_caps(fields: dict[str, Any], expected: dict[str, int]) -> None:
    sent = sent_body(**fields)
    assert {name: sent[name] for name in sent if name.startswith("max_")} == expected


def test_the_target_has_its_own_name_for_the_model() -> None:
    assert sent_body(model="real-4.1")["model"] == "gpt-4.1"


# Streams: what is forwarded -------------------------------------------------------------------------------------------

STREAM = b"".join(
    [
        b": welcome\n\n",
        event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]),
        delta("Zwölf"),
        b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": "data: \n\n x"}}]}) + b"\r\n\r\n",
        delta("", finish="stop"),
    ]
)
USAGE = usage(12, 34)


def complete(talk: Talk, chunks: list[bytes]) -> bytes:
    """Play the chunks, the last of which is the end; give what the caller received."""
    commands: list[Command] = []
    for position, data in enumerate(chunks):
        commands += talk.chunk(data, end=position == len(chunks) - 1)
    return forwarded(commands, chunks)


@pytest.mark.parametrize("split", range(0, len(STREAM + USAGE + DONE) + 1))
def test_a_stream_is_forwarded_byte_for_byte_wherever_it_is_cut(split: int) -> None:
    talk = Talk().streaming(1_000)
    data = STREAM + USAGE + DONE
    assert complete(talk, [data[:split], data[split:]]) == STREAM + DONE
    assert (talk.record.outcome, talk.record.usage_source) == (Outcome.OK, UsageSource.PROVIDER)
    assert talk.settlement.actual == Amount(12 * INPUT_NANOUSD + 34 * OUTPUT_NANOUSD, 46)


@pytest.mark.parametrize("wants_usage", [True, False])
@pytest.mark.parametrize("tail", [b"", b": after\n\n", b'data: {"x"'], ids=["nothing", "a comment", "half an event"])
def test_a_stream_is_forwarded_byte_by_byte(tail: bytes, wants_usage: bool) -> None:
    talk = Talk().streaming(1_000, stream_options={"include_usage": wants_usage})
    data = STREAM + USAGE + DONE + tail
    received = complete(talk, [data[i : i + 1] for i in range(len(data))])
    assert received == STREAM + (USAGE if wants_usage else b"") + DONE + tail
    assert talk.record.outcome is Outcome.OK
    assert talk.settlement.actual.tokens == 46


def test_chunks_of_whole_events_are_left_as_they_are() -> None:
    talk = Talk().streaming(1_000)
    talk.chunk(b": hello\n\n")
    assert talk.chunk(delta(" a") + delta(" b"))[0] == UNCHANGED
    assert talk.chunk(b"")[0] == UNCHANGED


def test_a_chunk_of_hidden_usage_alone_becomes_an_empty_one() -> None:
    talk = Talk().streaming(1_000)
    talk.chunk(STREAM)
    assert talk.chunk(USAGE) == [ForwardChunk(b"")]


def test_half_an_event_is_held_back() -> None:
    talk = Talk().streaming(1_000)
    whole = delta(" a") + delta(" b")
    assert talk.chunk(whole[:-1])[0] == ForwardChunk(delta(" a"))
    assert talk.chunk(whole[-1:])[0] == ForwardChunk(delta(" b"))


def test_a_last_event_without_its_line_ends_is_passed_on() -> None:
    talk = Talk().streaming(1_000)
    assert complete(talk, [STREAM, DONE.strip()]) == STREAM + DONE.strip()
    assert talk.record.outcome is Outcome.OK


def test_hidden_usage_without_its_line_ends_is_hidden_and_counts() -> None:
    talk = Talk().streaming(1_000)
    assert complete(talk, [STREAM, USAGE.strip()]) == STREAM
    assert talk.settlement.actual.tokens == 46


def test_a_last_event_without_its_line_ends_is_held_for_like_any_other() -> None:
    talk = Talk().streaming(3)
    last = delta(" word" * 50, finish="stop")
    assert kinds(talk.chunk(last.strip(), end=True)) == [ExtendLease]
    talk.lease(3, limited=True)
    assert b"word" not in talk.all(ForwardChunk)[0].body  # type: ignore[operator]
    assert (talk.record.outcome, talk.settlement.actual) == (Outcome.CUT, cost(50))


# Streams: the response's headers --------------------------------------------------------------------------------------


def test_response_headers_are_cleaned_and_the_requests_id_is_set() -> None:
    talk = Talk().sent(stream=True)
    talk.answered(headers=(*SSE, ("set-cookie", "a=b"), ("openai-organization", "org"), ("content-length", "5")))
    response = talk.one(ContinueResponse)
    assert response.set_headers == (("x-request-id", REQUEST_ID),)
    assert set(response.remove_headers) == {
        "x-envoy-attempt-count",
        "set-cookie",
        "openai-organization",
        "content-length",
    }


def test_a_whole_answer_keeps_its_length() -> None:
    talk = Talk().sent()
    talk.answered(headers=(*JSON, ("content-length", "5")))
    assert "content-length" not in talk.one(ContinueResponse).remove_headers


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("service/a@x.example/day/usd/soft", "service/a@x.example/day/usd/soft"),
        ("model/x\r\nset-cookie: a/day/usd/soft", "model/x%0D%0Aset-cookie:%20a/day/usd/soft"),
        ("team/команда/day/usd/soft", "team/%D0%BA%D0%BE%D0%BC%D0%B0%D0%BD%D0%B4%D0%B0/day/usd/soft"),
    ],
    ids=["as it is", "no line of its own", "no letters that headers lack"],
)
def test_a_soft_limit_is_told_in_a_header(name: str, shown: str) -> None:
    talk = Talk()
    talk.post(stream=True)
    talk.feed(HoldAnswered(Hold(REQUEST_ID, (), cost(20), over=(name, "another"))))
    talk.answered(headers=SSE)
    assert dict(talk.one(ContinueResponse).set_headers)["x-tollgate-budget"] == f"over its soft limit: {shown}"


# Streams: the lease ---------------------------------------------------------------------------------------------------


def test_more_is_asked_for_ahead_and_never_twice_at_once() -> None:
    talk = Talk().streaming(2 * LEASE)
    for _ in range(LEASE):
        assert talk.chunk(delta(" word")) == [UNCHANGED]
    # Less than a lease is left: asked for while the chunk goes on.
    assert talk.chunk(delta(" word")) == [
        UNCHANGED,
        ExtendLease(REQUEST_ID, talk.windows, cost(LEASE + 1), cost(3 * LEASE + 1)),
    ]
    assert talk.chunk(delta(" word")) == [UNCHANGED]
    assert talk.feed(TimerFired()) == [SetTimer(HEARTBEAT_MS)]
    assert talk.lease(3 * LEASE + 1) == []
    assert talk.chunk(delta(" word")) == [UNCHANGED]


def test_nothing_is_asked_beyond_the_cap() -> None:
    talk = Talk().streaming(LEASE, max_tokens=LEASE)
    for _ in range(LEASE):
        assert talk.chunk(delta(" word")) == [UNCHANGED]


def test_more_than_the_cap_is_held_for_all_the_same_by_leases() -> None:
    talk = Talk().streaming(LEASE, max_tokens=LEASE)
    talk.chunk(b"".join(words(LEASE)))
    assert talk.chunk(delta(" and three more")) == [
        ExtendLease(REQUEST_ID, talk.windows, cost(LEASE + 3), cost(3 * LEASE + 3))
    ]
    talk.lease(3 * LEASE + 3)
    assert talk.chunk(delta(" word")) == [UNCHANGED]


def test_a_chunk_waits_for_what_it_needs_and_keeps_the_order() -> None:
    talk = Talk().streaming(2)
    chunks = [b"".join(words(2)), delta(" three") + delta(" four"), delta(" five"), delta(" six")]
    talk.chunk(chunks[0])
    talk.lease(2, limited=True)
    assert kinds(talk.chunk(chunks[1])) == [ExtendLease]
    assert talk.exchange.state is State.WAITING
    assert talk.chunk(chunks[2]) == talk.chunk(chunks[3]) == []
    commands = talk.lease(40)
    assert kinds(commands) == [ForwardChunk, ForwardChunk, ForwardChunk]
    assert forwarded(talk.commands, chunks) == b"".join(chunks)
    assert talk.state is State.STREAMING


def test_a_chunk_that_waits_for_a_question_already_asked_asks_again_before_it_is_cut() -> None:
    talk = Talk().streaming(2)
    assert kinds(talk.chunk(delta(" one"))) == [ForwardChunk, ExtendLease]
    assert talk.chunk(delta(" two three")) == []  # waits for that answer
    assert kinds(talk.lease(2, limited=True)) == [ExtendLease]
    assert talk.all(ExtendLease)[-1].used == cost(3)
    assert kinds(talk.lease(3)) == [ForwardChunk, ExtendLease]
    assert talk.state is State.STREAMING


def test_a_grant_that_is_enough_for_the_waiting_chunk_and_not_for_the_next() -> None:
    talk = Talk().streaming(1)
    chunks = [delta(" one two"), delta(" three"), delta(" four")]
    talk.chunk(chunks[0])
    talk.chunk(chunks[1])
    talk.chunk(chunks[2])
    commands = talk.lease(3, limited=True)
    # The chunks that are covered go; the extension asked ahead of need is what the last one waits for.
    assert kinds(commands) == [ForwardChunk, ExtendLease, ForwardChunk]
    assert talk.state is State.WAITING
    assert kinds(talk.lease(3, limited=True)) == [ExtendLease]
    assert kinds(talk.lease(3, limited=True)) == [ForwardChunk, SetTimer]
    assert forwarded(talk.commands, chunks).startswith(chunks[0] + chunks[1] + b'data: {"error"')


def test_a_lease_that_shrinks_nothing_is_asked_for() -> None:
    """The target is a total: it never lies below what is held already."""
    talk = Talk().streaming(600)
    talk.feed(TimerFired())
    assert talk.one(ExtendLease).target == cost(600)


# The cut --------------------------------------------------------------------------------------------------------------


def cut_talk(covered: int, chunk: bytes, end: bool = False) -> Talk:
    talk = Talk().streaming(covered)
    talk.chunk(chunk, end)
    talk.lease(covered, limited=True)
    return talk


def test_a_stream_is_cut_at_exactly_the_token_that_is_covered() -> None:
    chunk = b"".join(words(5))
    talk = cut_talk(3, chunk)
    received = forwarded(talk.commands, [chunk])
    assert received.startswith(b"".join(words(3)) + b"data: ")
    error = orjson.loads(received.removeprefix(b"".join(words(3)) + b"data: "))["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert BUDGET_ID in error["message"]
    assert received.endswith(b"\n\n")
    assert talk.commands[-1] == SetTimer(limits.CUT_FLUSH_MS)
    assert talk.feed(TimerFired())[0] == Reply(429, details="insufficient_quota")
    assert talk.settlement == Settlement(REQUEST_ID, talk.windows, cost(5))  # what was received
    assert (talk.record.outcome, talk.record.budget_id, talk.record.status) == (Outcome.CUT, BUDGET_ID, 200)
    assert talk.record.usage_source is UsageSource.COUNTED


def test_the_error_stands_clean_after_half_an_event() -> None:
    talk = cut_talk(3, b"".join(words(5)) + b'data: {"choices"')
    assert b'data: {"choices"d' not in (talk.all(ForwardChunk)[0].body or b"")
    assert (talk.all(ForwardChunk)[0].body or b"").startswith(b"".join(words(3)) + b'data: {"error"')


@pytest.mark.parametrize("closing", [b"", DONE], ids=["open", "closed"])
def test_a_cut_in_the_providers_last_chunk_needs_no_reset(closing: bytes) -> None:
    chunk = b"".join(words(5)) + closing
    talk = cut_talk(3, chunk, end=True)
    assert kinds(talk.commands[-2:]) == [ForwardChunk, Settle]
    assert talk.all(Reply) == []
    assert forwarded(talk.commands, [chunk]).startswith(b"".join(words(3)) + b'data: {"error"')
    assert (talk.settlement.actual, talk.record.outcome) == (cost(5), Outcome.CUT)


def test_what_comes_during_the_cut_is_counted_and_goes_no_further() -> None:
    talk = Talk().streaming(1)
    late = b"".join(words(4))
    chunks = [delta(" one two"), late[:50], late[50:70], late[70:]]
    talk.chunk(chunks[0])
    assert talk.chunk(chunks[1]) == []  # queued behind the one that waits
    talk.lease(1, limited=True)
    assert talk.chunk(chunks[2]) == talk.chunk(chunks[3], end=True) == []
    talk.feed(TimerFired())
    assert talk.settlement.actual == cost(6)
    assert len(talk.all(ForwardChunk)) == 1
    assert talk.unanswered == talk.unanswered.__class__()


def test_usage_that_comes_during_the_cut_is_what_is_posted() -> None:
    talk = cut_talk(1, delta(" one two"))
    talk.chunk(delta(finish="stop") + usage(20, 30) + DONE, end=True)
    talk.feed(TimerFired())
    assert talk.settlement.actual.tokens == 50
    assert talk.record.usage_source is UsageSource.PROVIDER


def test_an_error_that_comes_during_the_cut_does_not_make_it_another_end() -> None:
    talk = cut_talk(1, delta(" one two"))
    talk.chunk(event(error={"message": "overloaded"}), end=True)
    talk.feed(TimerFired())
    assert talk.record.outcome is Outcome.CUT


def test_trailers_and_late_leases_change_nothing_about_a_cut() -> None:
    talk = cut_talk(1, delta(" one two"))
    assert talk.feed(ResponseTrailers(("x",))) == talk.feed(LeaseAnswered(Lease(cost(500)))) == []
    assert kinds(talk.feed(TimerFired())) == [Reply, Settle]


def test_envoys_messages_that_cross_the_reset_change_nothing() -> None:
    talk = cut_talk(1, delta(" one two"))
    talk.feed(TimerFired())
    assert talk.chunk(delta(" three")) == talk.feed(ResponseTrailers(())) == talk.close() == []


@pytest.mark.parametrize("gone", [True, False], ids=["the hold is gone", "the ledger is down"])
def test_without_the_ledger_what_was_granted_is_used_up_and_then_the_stream_is_cut(gone: bool) -> None:
    lost = LeaseAnswered(Lease(NOTHING, gone=True) if gone else None)
    talk = Talk().streaming(2 * LEASE)
    for data in words(LEASE + 1):
        talk.chunk(data)
    talk.feed(lost)
    passed = LEASE + 1
    for data in words(2 * LEASE):
        commands = talk.chunk(data)
        if ForwardChunk not in kinds(commands):
            break
        passed += 1
        if ExtendLease in kinds(commands):
            talk.feed(lost)
    assert passed == (LEASE + 1 if gone else 2 * LEASE)
    assert talk.state is State.WAITING
    assert kinds(talk.feed(lost)) == [ForwardChunk, SetTimer]
    talk.feed(TimerFired())
    assert (talk.one(Reply).status, talk.record.outcome) == (503, Outcome.CUT)
    assert talk.settlement.actual == cost(passed + 1)
    assert talk.record.budget_id == BUDGET_ID


def test_an_unanswered_question_from_before_does_not_cut() -> None:
    talk = Talk().streaming(2)
    talk.chunk(delta(" one"))  # asks ahead
    talk.chunk(delta(" two three"))
    assert kinds(talk.feed(LeaseAnswered(None))) == [ExtendLease]
    assert kinds(talk.lease(30)) == [ForwardChunk]


def test_the_wait_of_a_chunk_is_bounded_by_two_questions() -> None:
    talk = Talk().streaming(2)
    talk.chunk(delta(" one"))
    talk.chunk(delta(" two three"))
    talk.feed(LeaseAnswered(None))
    assert kinds(talk.feed(LeaseAnswered(None))) == [ForwardChunk, SetTimer]


# Heartbeats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.SENT, State.STREAMING, State.ANSWERING, State.FAILING], ids=lambda s: s.name)
def test_a_slow_request_keeps_its_hold_alive(state: State) -> None:
    talk = at(state)
    assert kinds(talk.feed(TimerFired())) == [ExtendLease, SetTimer]
    assert talk.feed(TimerFired()) == [SetTimer(HEARTBEAT_MS)]
    assert talk.feed(LeaseAnswered(None)) == []
    assert kinds(talk.feed(TimerFired())) == [ExtendLease, SetTimer]


def test_a_stream_that_waits_for_the_ledger_asks_nothing_more() -> None:
    talk = at(State.WAITING)
    assert talk.feed(TimerFired()) == [SetTimer(HEARTBEAT_MS)]


def test_heartbeats_post_what_may_have_been_written_unseen() -> None:
    talk = Talk().sent(1_000)
    talk.tick(2_000)
    talk.feed(TimerFired())
    assert talk.one(ExtendLease).used == cost(2 * limits.ABANDONED_TOKENS_PER_S)


# How streams end ------------------------------------------------------------------------------------------------------

LEFTOVERS = {"nothing": b"", "half an event": b'data: {"choices": [{"del'}
EVENTS = [delta(role="assistant"), delta(" one"), delta(" two"), delta(" three")]


@pytest.mark.parametrize("leftover", LEFTOVERS.values(), ids=LEFTOVERS)
@pytest.mark.parametrize("position", range(len(EVENTS) + 1))
@pytest.mark.parametrize("separate", [True, False], ids=["an empty last chunk", "in the last chunk"])
def test_a_provider_that_ends_early_is_an_error_to_the_caller(position: int, leftover: bytes, separate: bool) -> None:
    talk = Talk().streaming(1_000)
    data = b"".join(EVENTS[:position]) + leftover
    received = complete(talk, [data, b""] if separate else [data])
    assert received.startswith(b"".join(EVENTS[:position]) + b'data: {"error"')
    assert ENDED_EARLY in received
    assert received.count(b"data: ") == position + 1
    assert talk.record.outcome is Outcome.UPSTREAM_ERROR
    assert talk.settlement.actual == cost(max(0, position - 1))
    assert talk.all(Reply) == []


ENDINGS: dict[str, tuple[list[bytes], Outcome, UsageSource, Amount]] = {
    "no [DONE] but a finish reason": ([delta(" one"), delta(finish="stop")], Outcome.OK, UsageSource.COUNTED, cost(1)),
    "[DONE] without a finish reason": ([delta(" one"), DONE], Outcome.OK, UsageSource.COUNTED, cost(1)),
    "usage of zero": ([delta(" one"), usage(0, 0), DONE], Outcome.OK, UsageSource.PROVIDER, Amount(0, 0)),
    "usage twice: the last": (
        [usage(9, 7), delta(" one"), usage(9, 8), DONE],
        Outcome.OK,
        UsageSource.PROVIDER,
        cost(8),
    ),
    "usage that shrinks: the last": ([usage(9, 70), usage(9, 8), DONE], Outcome.OK, UsageSource.PROVIDER, cost(8)),
    "usage, and then an early end": (
        [delta(" one two three"), usage(12, 2)],
        Outcome.UPSTREAM_ERROR,
        UsageSource.COUNTED,
        cost(3, prompt=12),
    ),
    "usage beyond the count, and then an early end": (
        [delta(" one"), usage(12, 40)],
        Outcome.UPSTREAM_ERROR,
        UsageSource.PROVIDER,
        cost(40, prompt=12),
    ),
    "an error in the stream": (
        [delta(" one"), event(error={"message": "overloaded"}), DONE],
        Outcome.UPSTREAM_ERROR,
        UsageSource.COUNTED,
        cost(1),
    ),
}


@pytest.mark.parametrize(("stream", "outcome", "source", "actual"), ENDINGS.values(), ids=ENDINGS)
def test_what_a_stream_that_ended_is_billed(
    stream: list[bytes], outcome: Outcome, source: UsageSource, actual: Amount
) -> None:
    talk = Talk().streaming(1_000, stream_options={"include_usage": True})
    received = complete(talk, stream)
    assert received.startswith(b"".join(stream))
    assert (ENDED_EARLY in received) == (outcome is Outcome.UPSTREAM_ERROR and b'"error"' not in b"".join(stream))
    assert (talk.record.outcome, talk.record.usage_source) == (outcome, source)
    assert (talk.settlement.actual, talk.record.cost_nanousd) == (actual, actual.nanousd)


@pytest.mark.parametrize(("text", "tokens"), [("", 0), (" one", 1)], ids=["no text", "text"])
def test_zeros_of_a_stream_that_did_not_end_do_not_make_the_prompt_free(text: str, tokens: int) -> None:
    """Some providers send zeros with every event until the last one."""
    talk = Talk().streaming(1_000)
    talk.chunk(delta(text, usage=figures(0, 0)))
    talk.close()
    assert talk.settlement.actual == cost(tokens)


def test_the_record_has_every_kind_of_token() -> None:
    talk = Talk().streaming(1_000)
    details: dict[str, Any] = {
        "prompt_tokens": 50,
        "completion_tokens": 40,
        "prompt_tokens_details": {"cached_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }
    complete(talk, [delta(" one", finish="stop"), event(choices=[], usage=details), DONE])
    record = talk.record
    assert (record.prompt_tokens, record.cached_prompt_tokens) == (50, 30)
    assert (record.completion_tokens, record.reasoning_tokens) == (40, 20)
    assert (record.requested_model, record.provider, record.model, record.route) == (
        "gpt-4o",
        "openai",
        *["gpt-4o"] * 2,
    )
    assert (record.stream, record.attempts, record.status, record.budget_id) == (True, 2, 200, BUDGET_ID)


def test_an_answer_says_which_tiers_price_holds() -> None:
    talk = Talk()
    talk.post(model="real-4.1", stream=True)
    talk.feed(HoldAnswered(Hold(REQUEST_ID, (), Amount(10**9, 1_000))))
    talk.answered(headers=SSE)
    complete(talk, [delta(" one", finish="stop", service_tier="priority"), usage(1_000, 1_000), DONE])
    dear = talk.gate.prices.price(Target("openai", "gpt-4.1"), "priority")
    plain = talk.gate.prices.price(Target("openai", "gpt-4.1"), None)
    assert dear != plain
    assert talk.record.price_version == plain.version
    assert talk.settlement.actual.nanousd == 1_000 * (dear.bands[-1].input + dear.bands[-1].output) // 10**6


def test_a_tier_without_a_price_does_not_lose_the_settlement() -> None:
    class NoTiers(PriceBook):
        def price(self, target: Target, service_tier: str | None) -> Any:
            return super().price(target, None) if service_tier is None else super().price(Target("openai", "?"), None)

    rules = (PriceRule("openai/gpt-4o", INPUT_NANOUSD * 10**6, OUTPUT_NANOUSD * 10**6),)
    plain = Talk().gate.prices
    talk = Talk(prices=NoTiers(rules, plain._now))
    talk.sent(1_000, stream=True)
    talk.answered(headers=SSE)
    complete(talk, [delta(" one", finish="stop", service_tier="odd"), usage(PROMPT, 4), DONE])
    assert (talk.settlement.actual, talk.record.outcome) == (cost(4), Outcome.OK)


def test_a_stream_teaches_the_factor() -> None:
    talk = Talk().streaming(1_000)
    complete(talk, [*words(40), delta(finish="stop"), usage(9, 44), DONE])
    assert talk.one(Learn) == Learn(Target("openai", "gpt-4o"), 40, 44)


def test_what_is_billed_beside_the_text_teaches_nothing() -> None:
    """Or a caller could teach everybody's factor: a prediction that is wrong is billed, and not shown."""
    talk = Talk().streaming(1_000, prediction={"type": "content", "content": "x"})
    complete(talk, [*words(40), delta(finish="stop"), usage(9, 160), DONE])
    assert not talk.all(Learn)


def test_the_learned_factor_makes_the_running_count() -> None:
    talk = Talk(factor=lambda target: 2.0 if target == Target("openai", "gpt-4o") else 1.0).streaming(1_000)
    talk.chunk(delta(" one two three"))
    talk.close()
    assert talk.settlement.actual == cost(6, prompt=PROMPT + 2)  # of which two are text
    assert talk.all(Learn) == []


@pytest.mark.parametrize("queued", [False, True], ids=["at once", "while one waits"])
def test_an_event_that_is_too_long_ends_the_stream(queued: bool) -> None:
    talk = Talk().streaming(1 if queued else 1_000)
    giant = b"data: " + b"x" * limits.MAX_EVENT_BYTES
    talk.chunk(delta(" one two"))
    if queued:
        assert talk.chunk(giant) == talk.chunk(b"x") == []
        talk.close()
        assert talk.record.outcome is Outcome.CLIENT_GONE
    else:
        assert kinds(talk.chunk(giant)) == [ForwardChunk, SetTimer]
        assert talk.chunk(b"x" * 100) == []
        assert talk.feed(TimerFired())[0] == Reply(502, details="upstream_error")
        assert talk.record.outcome is Outcome.UPSTREAM_ERROR
    assert talk.settlement.actual == cost(2)


def test_a_waiting_stream_whose_next_chunk_is_too_long_is_cut_for_that() -> None:
    talk = Talk().streaming(1)
    talk.chunk(delta(" one two"))
    talk.chunk(b"data: " + b"x" * limits.MAX_EVENT_BYTES)
    assert kinds(talk.lease(50)) == [ForwardChunk, ForwardChunk, SetTimer]
    talk.feed(TimerFired())
    assert (talk.settlement.actual, talk.record.outcome) == (cost(2), Outcome.UPSTREAM_ERROR)


@pytest.mark.parametrize("leaves", [True, False], ids=["the caller leaves", "trailers"])
def test_an_error_event_is_how_a_stream_ended_whatever_comes_after(leaves: bool) -> None:
    talk = Talk().streaming(1_000)
    talk.chunk(delta(" one") + event(error={"message": "overloaded"}) + (DONE if leaves else b""))
    talk.close() if leaves else talk.feed(ResponseTrailers(()))
    assert (talk.record.outcome, talk.settlement.actual) == (Outcome.UPSTREAM_ERROR, cost(1))
    assert talk.all(Reply) == []


def test_every_choice_must_finish() -> None:
    talk = Talk().streaming(1_000, n=2)
    received = complete(talk, [delta(" one", finish="stop")])
    assert ENDED_EARLY in received


# Trailers -------------------------------------------------------------------------------------------------------------


def test_trailers_after_a_whole_stream_are_dropped() -> None:
    talk = Talk().streaming(1_000)
    talk.chunk(STREAM + USAGE + DONE)
    assert talk.feed(ResponseTrailers(("grpc-status", "x-secret")))[0] == DropTrailers(("grpc-status", "x-secret"))
    assert (talk.record.outcome, talk.settlement.actual.tokens) == (Outcome.OK, 46)


@pytest.mark.parametrize("stream", [delta(" one"), STREAM + DONE.strip()], ids=["no end", "a rest"])
def test_trailers_after_less_reset_the_stream(stream: bytes) -> None:
    talk = Talk().streaming(1_000)
    talk.chunk(stream)
    assert kinds(talk.feed(ResponseTrailers(()))) == [Reply, Settle]
    assert (talk.one(Reply).status, talk.record.outcome) == (502, Outcome.UPSTREAM_ERROR)


def test_trailers_wait_their_turn() -> None:
    talk = Talk().streaming(1)
    talk.chunk(delta(" one two", finish="stop") + DONE)
    assert talk.feed(ResponseTrailers(("x",))) == []
    assert kinds(talk.lease(50)) == [ForwardChunk, DropTrailers, Settle]
    assert talk.record.outcome is Outcome.OK


def test_trailers_behind_a_chunk_that_is_cut_change_nothing() -> None:
    talk = Talk().streaming(1)
    talk.chunk(delta(" one two", finish="stop"))
    talk.feed(ResponseTrailers(("x",)))
    assert kinds(talk.lease(1, limited=True)) == [ForwardChunk, SetTimer]
    talk.feed(TimerFired())
    assert (talk.record.outcome, talk.settlement.actual) == (Outcome.CUT, cost(2))


def test_trailers_after_a_whole_answer() -> None:
    talk = Talk().sent()
    talk.answered()
    talk.chunk(answer(usage=figures(9, 4)))
    assert talk.feed(ResponseTrailers(("x",)))[0] == DropTrailers(("x",))
    assert (talk.record.outcome, talk.settlement.actual) == (Outcome.OK, cost(4))


def test_trailers_after_an_errors_body_that_was_kept_back() -> None:
    talk = at(State.FAILING)
    talk.chunk(b"{}")
    assert kinds(talk.feed(ResponseTrailers(()))) == [Reply, Settle]
    assert talk.settlement.actual == NOTHING


# Whole answers --------------------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[bytes, Outcome, UsageSource, Amount]] = {
    "with usage": (answer(usage=figures(12, 34)), Outcome.OK, UsageSource.PROVIDER, cost(34, prompt=12)),
    "without usage": (answer(" one two three"), Outcome.OK, UsageSource.COUNTED, cost(3)),
    "without usage, longer than its cap": (answer(" word" * 1_500), Outcome.OK, UsageSource.COUNTED, cost(1_000)),
    "no JSON": (b" one two three", Outcome.UPSTREAM_ERROR, UsageSource.COUNTED, cost(3)),
    "an error with status 200": (b'{"error": "no"}', Outcome.UPSTREAM_ERROR, UsageSource.COUNTED, cost(6)),
}


@pytest.mark.parametrize("size", [1, 7, 10_000_000])
@pytest.mark.parametrize(("data", "outcome", "source", "actual"), WHOLE.values(), ids=WHOLE)
def test_a_whole_answer(data: bytes, outcome: Outcome, source: UsageSource, actual: Amount, size: int) -> None:
    talk = Talk().sent()
    talk.answered()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert complete(talk, chunks) == data
    assert all(chunk == UNCHANGED for chunk in talk.all(ForwardChunk))
    assert (talk.record.outcome, talk.record.usage_source, talk.settlement.actual) == (outcome, source, actual)


def test_a_long_answer_without_usage_is_counted_by_its_beginning() -> None:
    counted: list[int] = []

    def counter(_: str) -> Any:
        def count(text: str) -> int:
            counted.append(len(text))
            return len(text) // 4

        return count

    talk = Talk(counter=counter)
    talk.post(n=128)
    talk.hold(128_000)
    talk.answered()
    counted.clear()
    talk.chunk(answer("word" * 64_000), end=True)
    assert sum(counted) == limits.MAX_COUNTED_CHARS
    assert talk.record.completion_tokens == 64_000


def test_an_answer_above_its_bound_is_passed_on_and_billed_by_its_beginning() -> None:
    talk = Talk().sent()
    talk.answered()
    data = answer("x" * limits.MAX_ANSWER_BYTES, usage=figures(9, 4))
    assert complete(talk, [data[:100], data[100:], b" "]) == data + b" "
    assert talk.settlement.actual == cost(1_000)  # the cap


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [("UT", 200), ("UC", 200), ("UR,URX", 200), ("UF,URX", 0), ("UH", 0), ("", 0)],
    ids=["too slow", "closed", "reset", "not connected", "no host", "not Envoy's"],
)
def test_an_answer_that_was_lost_on_its_way_is_billed_by_the_time_it_took(flags: str, tokens: int) -> None:
    talk = Talk().sent(1_000, max_tokens=500)
    talk.tick(1_000)
    talk.answered(504, ((FLAGS, flags), *JSON))
    talk.chunk(b"{}", end=True)
    assert talk.settlement.actual == (cost(tokens) if tokens else Amount(0, 0))
    assert talk.record.outcome is Outcome.UPSTREAM_ERROR


def test_a_stream_of_sound_is_held_for_whole() -> None:
    talk = Talk()
    talk.post(stream=True, max_tokens=30, modalities=["text", "audio"])
    assert talk.one(PlaceHold).ask.least == cost(30)


def test_a_budget_that_only_open_requests_use_up_may_be_tried_again() -> None:
    talk = Talk()
    talk.post()
    budget = talk.one(PlaceHold).ask.budgets[0]
    talk.feed(HoldAnswered(refusal(budget, posted=0)))
    assert ("retry-after", "5") in talk.one(Reply).headers
    assert "x-should-retry" not in dict(talk.one(Reply).headers)


def test_a_stream_that_is_answered_whole_is_not_passed_on_since_it_could_not_be_cut() -> None:
    talk = Talk().sent(stream=True)
    talk.answered()
    assert talk.one(Reply).status == talk.record.status == 502
    assert (talk.record.outcome, talk.settlement.actual) == (Outcome.UPSTREAM_ERROR, cost(0))


def test_a_reasoning_stream_that_is_answered_whole_is_metered_whole() -> None:
    talk = Talk().sent(stream=True, model="o3")
    talk.answered()
    talk.chunk(answer(usage=figures(9, 4)), end=True)
    assert talk.record.outcome is Outcome.OK
    assert talk.settlement.actual.tokens == 13


def test_a_stream_without_a_content_type_is_metered_as_one() -> None:
    talk = Talk().sent(1_000, stream=True)
    talk.answered(headers=())
    assert complete(talk, [STREAM, USAGE, DONE]) == STREAM + DONE
    assert talk.settlement.actual.tokens == 46


def test_a_stream_that_nobody_asked_for_is_metered_as_one() -> None:
    talk = Talk().sent(1_000)
    talk.answered(headers=SSE)
    assert complete(talk, [STREAM, USAGE, DONE]) == STREAM + DONE
    assert talk.settlement.actual.tokens == 46


# Answers that are replaced --------------------------------------------------------------------------------------------

REPLACED: dict[str, tuple[int, tuple[tuple[str, str], ...], bool, Amount]] = {
    "the key was refused": (401, JSON, False, NOTHING),
    "the key may not": (403, JSON, False, NOTHING),
    "a redirect": (302, (("location", "https://elsewhere.example"),), True, NOTHING),
    "not modified": (304, (), True, NOTHING),
    "gzip": (200, (*JSON, ("content-encoding", "gzip")), False, cost(0)),
    "gzip, twice": (200, (*SSE, ("content-encoding", "gzip, identity")), False, cost(0)),
    "a compressed error, in which secrets are not seen": (429, (("content-encoding", "br"),), False, NOTHING),
    "two encodings": (200, (("content-encoding", "identity"), ("content-encoding", "gzip")), False, cost(0)),
    "two types": (200, (*SSE, *JSON), False, cost(0)),
    "an empty answer": (200, JSON, True, cost(0)),
}


@pytest.mark.parametrize(("status", "headers", "end", "actual"), REPLACED.values(), ids=REPLACED)
def test_answers_that_do_not_go_on(
    status: int, headers: tuple[tuple[str, str], ...], end: bool, actual: Amount
) -> None:
    talk = Talk().sent()
    refresh = [RefreshSecret] if status in (401, 403) else []
    assert kinds(talk.answered(status, headers, end)) == [Reply, Settle, *refresh]
    assert (talk.one(Reply).status, talk.error["code"]) == (502, "upstream_error")
    assert (talk.record.status, talk.record.outcome, talk.record.attempts) == (502, Outcome.UPSTREAM_ERROR, 2)
    assert talk.settlement.actual == actual


REFUSALS = {
    "openai": (401, b"", True),
    "whoever means the key": (403, b"", True),
    "gemini": (400, b'{"error": {"message": "API key not valid. Please pass a valid API key."}}', True),
    "xai": (400, b'{"error": "Incorrect API key provided: sk-***."}', True),
    "the caller is at fault": (400, b'{"error": {"message": "temperature must be below 2"}}', False),
    "one that blames no key": (429, b'{"error": {"message": "too many calls with this API key"}}', False),
}


@pytest.mark.parametrize(("status", "body", "refused"), REFUSALS.values(), ids=REFUSALS)
def test_a_key_that_its_provider_refuses_is_fetched_again(status: int, body: bytes, refused: bool) -> None:
    talk = Talk().sent()
    commands = talk.answered(status)
    if status not in (401, 403):
        commands += talk.chunk(body[:30]) + talk.chunk(body[30:], end=True)
    asked = [command for command in commands if isinstance(command, RefreshSecret)]
    assert asked == ([RefreshSecret("openai")] if refused else [])


def test_identity_is_an_encoding_that_may_pass() -> None:
    talk = Talk().sent()
    talk.answered(headers=(*JSON, ("content-encoding", " Identity")))
    assert talk.state is State.ANSWERING


@pytest.mark.parametrize("headers", [JSON, SSE, ()], ids=["json", "sse", "untyped"])
def test_an_error_is_kept_back_until_it_is_whole_and_redacted(headers: tuple[tuple[str, str], ...]) -> None:
    talk = Talk().sent()
    talk.answered(429, (*headers, ("retry-after", "3"), ("content-length", "9"), ("x-ratelimit-limit", "1")))
    response = talk.one(ContinueResponse)
    assert "content-length" in response.remove_headers
    assert "x-ratelimit-limit" in response.remove_headers
    assert "retry-after" not in response.remove_headers
    assert ("x-request-id", REQUEST_ID) in response.set_headers
    text = f'{{"error": "wrong key {SECRET}!"}}'.encode()
    chunks = [text[:25], text[25:]]
    assert complete(talk, chunks) == b'{"error": "wrong key [redacted]!"}'
    assert talk.all(ForwardChunk)[0] == ForwardChunk(b"")
    assert (talk.record.outcome, talk.record.status) == (Outcome.UPSTREAM_ERROR, 429)
    assert (talk.settlement.actual, talk.record.cost_nanousd) == (NOTHING, 0)


def test_an_error_without_a_body() -> None:
    talk = Talk().sent()
    assert kinds(talk.answered(500, (), end=True)) == [ContinueResponse, Settle]
    assert talk.record.status == 500


@pytest.mark.parametrize("excess", [0, 1, 1_000])
def test_an_error_that_is_too_long_is_replaced(excess: int) -> None:
    """It would be cut off, perhaps in the middle of a secret."""
    talk = Talk().sent()
    talk.answered(500)
    received = complete(talk, [b"x" * limits.MAX_ERROR_BYTES, SECRET.encode()[:excess]])
    assert orjson.loads(received)["error"]["code"] == "upstream_error"


@pytest.mark.parametrize(
    "reflected",
    [event(error={"message": f"wrong key {SECRET}!"}), delta(f" {SECRET}"), f": {SECRET}\n\n".encode()],
    ids=["error", "text", "comment"],
)
def test_no_secret_passes_in_a_stream(reflected: bytes) -> None:
    talk = Talk().streaming(1_000)
    chunks = [reflected[:20], reflected[20:]]
    commands = [*talk.chunk(chunks[0]), *talk.chunk(chunks[1])]
    assert forwarded(commands, chunks) == reflected.replace(SECRET.encode(), b"[redacted]")


def test_no_secret_passes_in_a_whole_answer() -> None:
    talk = Talk().sent()
    talk.answered()
    assert kinds(talk.chunk(answer(SECRET))) == [Reply, Settle]
    assert talk.one(Reply).status == talk.record.status == 502
    assert SECRET.encode() not in talk.one(Reply).body


def test_no_secret_passes_in_a_header() -> None:
    talk = Talk().sent()
    talk.answered(headers=(*JSON, ("openai-processing-ms", SECRET), ("date", "today")))
    removed = talk.one(ContinueResponse).remove_headers
    assert "openai-processing-ms" in removed
    assert "date" not in removed


# Reasoning models -----------------------------------------------------------------------------------------------------

UNSEEN = limits.ABANDONED_TOKENS_PER_S


def thinking(**fields: Any) -> Talk:
    return Talk().sent(500, model="o3", stream=True, **fields)


def test_thoughts_before_any_answer_are_counted() -> None:
    talk = thinking()
    talk.tick(1_000)
    talk.close()
    assert talk.settlement.actual == cost(UNSEEN)


@pytest.mark.parametrize("sent", [b"", b": keep-alive\n\n", delta(role="assistant")], ids=["nothing", "ping", "role"])
def test_thoughts_after_the_headers_and_before_the_first_token_are_counted(sent: bytes) -> None:
    talk = thinking()
    talk.answered(headers=SSE)
    talk.chunk(sent)
    talk.tick(2_000)
    talk.close()
    assert talk.settlement.actual == cost(2 * UNSEEN)


def test_after_the_first_token_only_what_is_seen_is_added() -> None:
    talk = thinking()
    talk.tick(1_000)
    talk.answered(headers=SSE)
    talk.chunk(delta(" one"))
    talk.tick(60_000)
    talk.chunk(delta(" two"))
    talk.close()
    assert talk.settlement.actual == cost(UNSEEN + 2)


def test_every_choice_has_its_thoughts() -> None:
    talk = thinking(n=2)
    talk.tick(1_000)
    talk.close()
    assert talk.settlement.actual == cost(2 * UNSEEN)


def test_thoughts_never_go_beyond_the_cap() -> None:
    talk = thinking()
    talk.answered(headers=SSE)
    talk.tick(3_600_000)
    talk.chunk(delta(" one two"))
    talk.close()
    assert talk.settlement.actual == cost(500)


def test_a_reasoning_stream_is_not_cut_within_its_cap() -> None:
    talk = thinking()
    talk.answered(headers=SSE)
    for data in words(500):
        assert talk.chunk(data) == [UNCHANGED]
    complete(talk, [delta(finish="stop"), usage(9, 480), DONE])
    assert (talk.settlement.actual, talk.record.outcome) == (cost(480), Outcome.OK)


# The caller leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [State.IDENTIFYING, State.BODY, State.COUNTING, State.HOLDING], ids=lambda s: str(s.name)
)
def test_a_caller_that_leaves_before_the_request_is_sent_pays_nothing(state: State) -> None:
    talk = at(state)
    assert kinds(talk.close()) == [WriteRecord]
    assert (talk.record.outcome, talk.record.status, talk.record.cost_nanousd) == (Outcome.CLIENT_GONE, 499, 0)
    assert talk.close() == []


LEAVING: dict[str, tuple[bool, list[bytes], int, Outcome]] = {
    "before the first event": (True, [], 0, Outcome.CLIENT_GONE),
    "after one event": (True, words(1), 1, Outcome.CLIENT_GONE),
    "in the middle of an event": (True, [delta(" one") + b'data: {"cho'], 1, Outcome.CLIENT_GONE),
    "before an event's line ends": (True, [delta(" one").strip()], 1, Outcome.CLIENT_GONE),
    "after the last token": (True, [*words(2), delta(finish="stop")], 2, Outcome.CLIENT_GONE),
    "after the usage": (True, [*words(2), delta(finish="stop"), usage(9, 3)], 3, Outcome.OK),
    "after everything": (True, [*words(2), delta(finish="stop"), usage(9, 3), DONE], 3, Outcome.OK),
    "after an early usage": (True, [usage(9, 3), *words(5)], 5, Outcome.CLIENT_GONE),
    "before the answer's first byte": (False, [], UNSEEN, Outcome.CLIENT_GONE),
    "in the middle of an answer": (False, [answer(usage=figures(9, 3))[:20]], UNSEEN, Outcome.CLIENT_GONE),
    "after a whole answer": (False, [answer(usage=figures(9, 3))], 3, Outcome.OK),
}


@pytest.mark.parametrize(("stream", "chunks", "tokens", "outcome"), LEAVING.values(), ids=LEAVING)
def test_a_caller_that_leaves_pays_for_what_the_provider_wrote(
    stream: bool, chunks: list[bytes], tokens: int, outcome: Outcome
) -> None:
    talk = Talk().sent(1_000, stream=stream)
    talk.answered(headers=SSE if stream else JSON)
    talk.tick(1_000)
    for data in chunks:
        talk.chunk(data)
    commands = talk.close()
    assert kinds(commands) == [Settle]
    assert (talk.settlement.actual, talk.record.outcome, talk.record.status) == (cost(tokens), outcome, 200)
    assert talk.close() == talk.feed(LeaseAnswered(None)) == []


@pytest.mark.parametrize("stream", [True, False], ids=["a stream", "a whole answer"])
def test_a_caller_that_leaves_before_the_answer_begins(stream: bool) -> None:
    talk = Talk().sent(1_000, stream=stream)
    talk.tick(1_000)
    talk.close()
    assert talk.settlement.actual == cost(0 if stream else UNSEEN)
    assert (talk.record.outcome, talk.record.status) == (Outcome.CLIENT_GONE, 499)


def test_a_caller_that_leaves_while_a_chunk_waits_pays_for_what_was_received() -> None:
    talk = Talk().streaming(1)
    talk.chunk(delta(" one two"))
    talk.chunk(delta(" three"))
    talk.close()
    assert (talk.settlement.actual, talk.record.outcome) == (cost(3), Outcome.CLIENT_GONE)
    assert talk.lease(500) == []


def test_a_caller_that_leaves_during_an_error() -> None:
    talk = at(State.FAILING)
    talk.close()
    assert (talk.settlement.actual, talk.record.outcome, talk.record.status) == (
        NOTHING,
        Outcome.UPSTREAM_ERROR,
        429,
    )


def test_a_caller_that_leaves_during_the_cut_was_cut() -> None:
    talk = at(State.CUTTING)
    talk.close()
    assert (talk.settlement.actual, talk.record.outcome) == (cost(2), Outcome.CUT)


# Times ----------------------------------------------------------------------------------------------------------------


def test_times_and_overhead_are_the_clocks() -> None:
    talk = Talk()

    talk.callers.unknown_keys = 1
    talk.ask()
    talk.tick(5)
    talk.feed(KeysRefreshed())  # 5 ms of ours
    talk.tick(100)  # the caller sends its body
    talk.feed(RequestBody(body(stream=True), True))
    talk.tick(3)
    talk.hold(2)  # 3 ms of ours
    talk.tick(400)  # the provider thinks
    talk.answered(headers=SSE)
    talk.tick(50)
    talk.chunk(b": ping\n\n")
    talk.tick(50)
    talk.chunk(delta(" one"))  # the first token
    talk.lease(1, limited=True)
    talk.tick(10)
    talk.chunk(delta(" two"))
    talk.tick(7)
    talk.lease(50)  # 7 ms of ours: the chunk waited
    talk.tick(20)
    talk.chunk(delta(finish="stop") + DONE, end=True)
    record = talk.record
    assert record.overhead_us == 15_000
    assert record.ttft_ms == 5 + 100 + 3 + 400 + 50 + 50
    assert record.duration_ms == 608 + 10 + 7 + 20
    assert record.ts == "2026-11-23T12:00:00.000+00:00"


def test_a_refusal_has_its_overhead_too() -> None:
    talk = Talk()
    talk.post()
    talk.tick(4)
    talk.feed(HoldAnswered(None))
    assert (talk.record.overhead_us, talk.record.duration_ms, talk.record.ttft_ms) == (4_000, 4, None)


def test_a_wall_clock_that_jumps_decides_nothing() -> None:
    talk = Talk().streaming(1_000)
    talk.wall_ms += 86_400_000
    talk.tick(30)
    complete(talk, [STREAM, DONE])
    assert talk.record.duration_ms == 30
    assert talk.record.ts.startswith("2026-11-24")


# Units ----------------------------------------------------------------------------------------------------------------


def test_a_budget_in_tokens_covers_tokens() -> None:
    talk = Talk()
    talk.gate = replace(
        talk.gate,
        policy=replace(
            talk.gate.policy,
            budgets=tuple(replace(rule, unit=Unit.TOKENS, limit=100) for rule in talk.gate.policy.budgets),
        ),
    )
    talk.exchange = type(talk.exchange)(talk.gate)
    talk.post(stream=True)
    windows = ()
    talk.feed(HoldAnswered(Hold(REQUEST_ID, windows, Amount(cost(500).nanousd, PROMPT + 3))))
    talk.answered(headers=SSE)
    assert kinds(talk.chunk(b"".join(words(3)))) == [ForwardChunk, ExtendLease]
    assert talk.chunk(delta(" four")) == []


def test_a_request_under_no_budget_is_metered_all_the_same() -> None:
    talk = Talk()
    talk.gate = replace(talk.gate, policy=replace(talk.gate.policy, budgets=()))
    talk.exchange = type(talk.exchange)(talk.gate)
    talk.streaming(1_000)
    assert talk.one(PlaceHold).ask.budgets == ()
    complete(talk, [STREAM, USAGE, DONE])
    assert (talk.record.budget_id, talk.record.cost_nanousd) == (None, 12 * INPUT_NANOUSD + 34 * OUTPUT_NANOUSD)


# Several targets ------------------------------------------------------------------------------------------------------

BOTH = frozenset({"openai", "anthropic"})


def failed_over(**fields: Any) -> Talk:
    """A stream whose first target has failed, and whose second, dearer one, answers."""
    talk = Talk(providers=lambda: BOTH)
    talk.post(model="both", stream=True, **fields)
    ask = talk.one(PlaceHold).ask
    windows = tuple(BudgetWindow(budget, 0, 86_400_000) for budget in ask.budgets)
    talk.feed(HoldAnswered(Hold(REQUEST_ID, windows, ask.ask)))
    talk.answered(headers=(*SSE, ("x-tollgate-internal-provider", "anthropic")))  # the second attempt's
    return talk


def test_the_chain_goes_with_the_request_and_the_itinerary_beside_it() -> None:
    forward = failed_over().one(ForwardRequest)
    headers = dict(forward.set_headers)
    assert headers["x-tollgate-internal-route"] == "openai,anthropic"
    assert headers["x-envoy-upstream-rq-per-try-timeout-ms"] == str(FIRST_BYTE_MS)
    way = Itinerary.decode(forward.itinerary or "")
    assert (way.request_id, way.dialect, way.stream) == (REQUEST_ID, "openai-chat", True)
    assert (way.body_bytes, way.written) == (len(forward.body), True)
    assert [leg.target.provider for leg in way.legs] == ["openai", "anthropic"]


def test_a_whole_answer_may_take_its_time() -> None:
    forward = Talk().sent().one(ForwardRequest)
    assert "x-envoy-upstream-rq-per-try-timeout-ms" not in dict(forward.set_headers)


def test_until_somebody_answers_the_dearest_is_held_for() -> None:
    ask = failed_over().one(PlaceHold).ask
    assert ask.ask.nanousd == DEAR * cost(2 * LEASE).nanousd


def test_who_answers_is_who_is_billed_and_written_down() -> None:
    talk = failed_over()
    talk.chunk(delta(" one two", finish="stop") + usage(PROMPT, 2) + DONE, end=True)
    record = talk.record
    assert (record.provider, record.model, record.attempts) == ("anthropic", "claude-haiku-4-5", 2)
    assert record.cost_nanousd == talk.settlement.actual.nanousd == DEAR * cost(2).nanousd
    assert record.price_version == talk.gate.prices.price(Target("anthropic", "claude-haiku-4-5"), None).version


def test_a_search_that_was_not_translated_is_not_billed() -> None:
    talk = Talk(providers=lambda: BOTH)
    talk.post(model="lenient", web_search_options={})
    talk.feed(HoldAnswered(Hold(REQUEST_ID, (), talk.one(PlaceHold).ask.ask)))
    talk.answered(headers=(*JSON, ("x-tollgate-internal-provider", "anthropic")))
    talk.chunk(answer(usage=figures(PROMPT, 5)), end=True)
    price = talk.gate.prices.price(Target("anthropic", "claude-haiku-4-5"), None)
    assert talk.settlement.actual.nanousd == price.hold_cost(PROMPT, 5)


def test_the_cheaper_first_target_makes_its_hold_reach_further() -> None:
    talk = Talk(providers=lambda: BOTH)
    talk.post(model="both", stream=True)
    ask = talk.one(PlaceHold).ask
    talk.feed(HoldAnswered(Hold(REQUEST_ID, tuple(BudgetWindow(b, 0, 1) for b in ask.budgets), ask.ask)))
    talk.feed(ResponseHeaders(((":status", "200"), ("x-tollgate-internal-provider", "openai"), *SSE), False))
    assert talk.chunk(delta(" word" * (2 * LEASE - 1))) != []  # not one word of it waits


def test_nobody_answered() -> None:
    """No host was left, so that Envoy has no endpoint to name: the first target is in the record."""
    talk = Talk(providers=lambda: BOTH)
    talk.post(model="both", stream=True)
    ask = talk.one(PlaceHold).ask
    talk.feed(HoldAnswered(Hold(REQUEST_ID, tuple(BudgetWindow(b, 0, 1) for b in ask.budgets), ask.ask)))
    talk.answered(503, JSON)
    talk.chunk(b"{}", end=True)
    assert (talk.record.provider, talk.record.outcome) == ("openai", Outcome.UPSTREAM_ERROR)


# What is no call ------------------------------------------------------------------------------------------------------


def test_models_are_listed_for_whom_the_token_names() -> None:
    talk = Talk()
    talk.feed(RequestHeaders(request_headers(method="GET", path="/v1/models", content_type=""), True))
    names = [model["id"] for model in orjson.loads(talk.one(Reply).body)["data"]]
    assert "gpt-4o" in names
    assert (talk.record.outcome, talk.record.status, talk.record.cost_nanousd) == (Outcome.OK, 200, 0)
    assert talk.callers.asked


def test_a_count_of_tokens_is_held_for_with_nothing() -> None:
    talk = Talk(providers=lambda: BOTH)
    talk.ask(path="/v1/messages/count_tokens")
    talk.feed(RequestBody(orjson.dumps({"model": "elsewhere", "messages": MESSAGES}), True))
    assert talk.one(PlaceHold).ask.ask == NOTHING
    talk.feed(HoldAnswered(Hold(REQUEST_ID, (), NOTHING)))
    talk.answered()
    talk.chunk(b'{"input_tokens":9}', end=True)
    assert (talk.record.outcome, talk.record.cost_nanousd, talk.settlement.actual) == (Outcome.OK, 0, NOTHING)


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_token_may_come_where_official_clients_put_a_key(header: str) -> None:
    talk = Talk()
    authorization = "" if header == "x-api-key" else TOKEN
    talk.ask(("x-api-key", TOKEN.removeprefix("Bearer ")), authorization=authorization)
    assert talk.callers.asked == [((TOKEN,), None)]


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/messages/batches", ("type", "error")),
        ("/v1beta/cachedContents", ("error", "code")),
        ("/v1/files", ("error", "type")),
    ],
)
def test_an_unknown_path_is_refused_in_its_callers_shape(path: str, shape: tuple[str, str]) -> None:
    talk = Talk()
    talk.ask(path=path)
    reply = talk.one(Reply)
    body = orjson.loads(reply.body)
    assert reply.status == 404
    assert body["type"] == "error" if shape == ("type", "error") else shape[1] in body["error"]


def test_a_stream_as_one_array_is_metered_and_cut_as_one() -> None:
    talk = Talk(providers=lambda: frozenset({"gemini"}))
    talk.ask(path="/v1beta/models/three:streamGenerateContent")
    talk.feed(RequestBody(orjson.dumps({"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}), True))
    ask = talk.one(PlaceHold).ask
    windows = tuple(BudgetWindow(budget, 0, 1) for budget in ask.budgets)
    talk.feed(HoldAnswered(Hold(REQUEST_ID, windows, ask.least)))
    talk.answered()

    def element(text: str) -> bytes:
        return orjson.dumps({"candidates": [{"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}]})

    first = b"[" + element(" one")
    talk.chunk(first)
    talk.chunk(b",\n" + element(" two three four five six"))
    talk.feed(LeaseAnswered(Lease(ask.least, limited_by=refusal(windows[0].budget))))
    talk.feed(LeaseAnswered(Lease(ask.least, limited_by=refusal(windows[0].budget))))
    sent = b"".join(first if chunk.body is None else chunk.body for chunk in talk.all(ForwardChunk))
    elements = orjson.loads(sent)
    assert elements[-1]["error"]["code"] == 429
    assert talk.state is State.CUTTING
