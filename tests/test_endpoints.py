"""The paths that are served, and those that are not."""

from __future__ import annotations

import pytest

from extproc import endpoints
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.endpoints import SERVED, Endpoint, find, speaker
from extproc.errors import BadRequest
from extproc.limits import MAX_MODEL_NAME_CHARS

CHAT, ANTHROPIC, GEMINI = "openai-chat", "anthropic-messages", "gemini-generate"
VERSIONED, GOOGLES = ("accept", "anthropic-version"), ("accept", "x-goog-api-client")


def found(path: str, names: tuple[str, ...] = ()) -> Endpoint:
    endpoint = find(path, names)
    assert endpoint is not None
    return endpoint


# --- What is served ---------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, Address]] = {
    "/v1/chat/completions": (CHAT, NO_ADDRESS),
    "/v1/responses": ("openai-responses", NO_ADDRESS),
    "/v1/completions": ("openai-completions", NO_ADDRESS),
    "/v1/embeddings": ("openai-embeddings", NO_ADDRESS),
    "/v1/messages": (ANTHROPIC, NO_ADDRESS),
    "/v1/messages/count_tokens": ("anthropic-count-tokens", NO_ADDRESS),
    "/v1/messages?beta=true": (ANTHROPIC, NO_ADDRESS),
    "/v1/chat/completions?": (CHAT, NO_ADDRESS),
    "/v1beta/models/gemini-2.5-pro:generateContent": (GEMINI, Address("gemini-2.5-pro")),
    "/v1beta/models/gemini-2.5-pro:generateContent?alt=sse": (GEMINI, Address("gemini-2.5-pro")),
    "/v1beta/models/g:streamGenerateContent": (GEMINI, Address("g", stream=True, array=True)),
    "/v1beta/models/g:streamGenerateContent?alt=json": (GEMINI, Address("g", stream=True, array=True)),
    "/v1beta/models/g:streamGenerateContent?alt=sse": (GEMINI, Address("g", stream=True)),
    "/v1beta/models/g:streamGenerateContent?prettyPrint=0&%24alt=s%73e": (GEMINI, Address("g", stream=True)),
    "/v1/models/gemini-2.5-pro:generateContent": (GEMINI, Address("gemini-2.5-pro")),
    "/v1/models/ft:g:streamGenerateContent?alt=sse": (GEMINI, Address("ft:g", stream=True)),
    "/v1/models/vendor/model:countTokens": ("gemini-count-tokens", Address("vendor/model")),
    "/v1beta/models/g:countTokens": ("gemini-count-tokens", Address("g")),
    "/v1beta/models/vendor/model:generateContent": (GEMINI, Address("vendor/model")),
    "/v1beta/models/ft:gpt-4o:org::id:generateContent": (GEMINI, Address("ft:gpt-4o:org::id")),
    "/v1beta/models/claude-sonnet-4-5%4020250929:countTokens": (
        "gemini-count-tokens",
        Address("claude-sonnet-4-5@20250929"),
    ),
}


@pytest.mark.parametrize(("path", "expected"), CALLS.items(), ids=CALLS)
def test_a_call(path: str, expected: tuple[str, Address]) -> None:
    endpoint = found(path, VERSIONED)
    assert (endpoint.dialect.name, endpoint.address) == expected
    assert (endpoint.method, endpoint.lists) == ("POST", False)


LISTS: dict[str, tuple[str, str | None]] = {
    "/v1/models": (CHAT, None),
    "/v1/models?limit=20": (CHAT, None),
    "/v1/models/gpt-4o": (CHAT, "gpt-4o"),
    "/v1/models/vendor/model": (CHAT, "vendor/model"),
    "/v1/models/vendor%2Fmodel": (CHAT, "vendor/model"),
    "/v1/models/ft:gpt-4o:org::id": (CHAT, "ft:gpt-4o:org::id"),
    "/v1/models/g:embedContent": (CHAT, "g:embedContent"),
    "/v1/models/generateContent": (CHAT, "generateContent"),
    "/v1/models/%C3%A9": (CHAT, "é"),
    "/v1/models/a%2541": (CHAT, "a%41"),
    "/v1/models/a+b": (CHAT, "a+b"),
    "/v1beta/models": (GEMINI, None),
    "/v1beta/models?pageSize=50": (GEMINI, None),
    "/v1beta/models/gemini-2.5-pro": (GEMINI, "gemini-2.5-pro"),
    "/v1beta/models/vendor/model": (GEMINI, "vendor/model"),
    "/v1beta/models/gpt-4o%3Aextended": (GEMINI, "gpt-4o:extended"),
}


@pytest.mark.parametrize(("path", "expected"), LISTS.items(), ids=LISTS)
def test_a_list_of_models_or_one_of_them(path: str, expected: tuple[str, str | None]) -> None:
    endpoint = found(path)
    assert (endpoint.dialect.name, endpoint.address) == (expected[0], Address(expected[1]))
    assert (endpoint.method, endpoint.lists) == ("GET", True)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/claude-opus-4-5"])
@pytest.mark.parametrize(
    ("names", "dialect"), [((), CHAT), (VERSIONED, ANTHROPIC), (GOOGLES, GEMINI)], ids=["", "anthropic", "google"]
)
def test_clients_that_share_a_path_are_told_apart(path: str, names: tuple[str, ...], dialect: str) -> None:
    assert found(path, names).dialect.name == dialect


@pytest.mark.parametrize("names", [VERSIONED, GOOGLES])
def test_where_they_share_none_their_headers_say_nothing(names: tuple[str, ...]) -> None:
    assert found("/v1beta/models", names).dialect.name == GEMINI
    assert found("/v1/chat/completions", names).dialect.name == CHAT
    assert found("/v1/messages", names).dialect.name == ANTHROPIC


def test_what_is_said_to_be_served_is() -> None:
    assert len(SERVED) == len(set(SERVED)) == 16
    for path in SERVED:
        found(path.replace("{model}", "m"))


# --- What is not ------------------------------------------------------------------------------------------------------

NOT_SERVED = [
    "", "/", "*", "/v1", "/v1/", "/v1beta", "/v1beta/", "/v2/chat/completions", "/v1/chat", "/v1/chat/completion",
    "/v1/Chat/Completions", "/V1/chat/completions", "/v1/chat/completions/", "/v1/chat//completions",
    "//v1/chat/completions", "/v1/chat/completions/../responses", "/v1/chat/./completions", "/v1/chat/%2e/completions",
    "/v1/chat/completions%2f", "/v1/chat%2Fcompletions", "/v1/%63hat/completions", "/v1/chat/completions#x",
    "/v1/chat/completions;x=y", "/v1/chat/completions ", " /v1/chat/completions", "/v1/chat/completions\x00",
    "/v1/chat/completions%00", "/v1/chat/completions%3Fx", "/v1/chat/completions/x", "/api/v1/chat/completions",
    "v1/chat/completions", "http://x/v1/chat/completions", "/v1/responses/resp_1", "/v1/responses/", "/v1/embedding",
    "/v1/responses/compact", "/v1/images/generations", "/v1/audio/speech", "/v1/files", "/v1/batches", "/v1/realtime",
    "/v1/moderations",
    "/v1/assistants", "/v1/fine_tuning/jobs", "/v1/complete", "/v1/messages/", "/v1/messages/batches",
    "/v1/messages/count_tokens/", "/v1/messages/count-tokens", "/v1/messages/Count_tokens", "/v1/MESSAGES",
    "/v1/model", "/v1/models/", "/v1/models//x", "/v1/models/x/", "/v1/models/a//b", "/v1/models/..", "/v1/models/.",
    "/v1/models/%2e%2e", "/v1/models/a/%2E%2E/b", "/v1/models/a%2F..%2Fb", "/v1/models/%2Fx", "/v1/models/a%0Ab",
    "/v1/models/a%00", "/v1/models/%7F", "/v1/models/%C2%85", "/v1/models/%E2%80%A8", "/v1/models/%FF", "/v1/models/%",
    "/v1/models/%zz", "/v1/models/a b", "/v1/models/é", "/v1/models/a\nb", "/v1/models/a#b", "/v1/models/a\\b",
    "/v1/models/" + "m" * (MAX_MODEL_NAME_CHARS + 1), "/v1/modelsx", "/v1/Models",
    "/v1beta/models/", "/v1beta/models/g:", "/v1beta/models/g:GenerateContent", "/v1beta/models/g:generatecontent",
    "/v1beta/models/g:generateContent/", "/v1beta/models/g:generateContent/x", "/v1beta/models/g:generateContentX",
    "/v1beta/models/g:streamGenerateContents", "/v1beta/models/g:counttokens", "/v1beta/models/g:countTokens:x",
    "/v1beta/models/g:embedContent", "/v1beta/models/g:batchEmbedContents", "/v1beta/models/g:batchGenerateContent",
    "/v1beta/models/g:predict", "/v1beta/models/g:predictLongRunning", "/v1beta/models/g:generateContent%20",
    "/v1beta/models/g%20:generateContent%00", "/v1beta/models/:generateContent", "/v1beta/models:generateContent",
    "/v1beta/models//g:generateContent", "/v1beta/models/../g:generateContent", "/v1beta/models/%2e%2e:generateContent",
    "/v1beta/models/a%0Ab:generateContent", "/v1beta/tunedModels/g:generateContent", "/v1beta/cachedContents",
    "/v1beta/files", "/v1beta1/models/g:generateContent", "/v1alpha/models/g:generateContent", "/v1beta/Models",
    "/v1beta/openai/chat/completions", "/v1beta/modelsx", "/upload/v1beta/files",
    "/v1/projects/p/locations/l/publishers/google/models/g:generateContent",
]  # fmt: skip


@pytest.mark.parametrize("names", [(), VERSIONED, GOOGLES], ids=["", "as Anthropic's client", "as Google's"])
@pytest.mark.parametrize("path", NOT_SERVED, ids=ascii)
def test_nothing_else_is_served(path: str, names: tuple[str, ...]) -> None:
    assert find(path, names) is None


def test_a_name_as_long_as_any() -> None:
    name = "m" * MAX_MODEL_NAME_CHARS
    assert found(f"/v1/models/{name}").address.model == name


@pytest.mark.parametrize("method", ["embedContent", "predict", "generatecontent", "x"])
def test_to_googles_clients_a_colon_begins_a_method(method: str) -> None:
    assert find(f"/v1/models/g:{method}", GOOGLES) is None


# --- Queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    ["key=AIza", "key=", "key", "a=b&key=c", "%6bey=c", "$key=c", "%24key=c", "access_token=c", "oauth_token=c"],
)
@pytest.mark.parametrize("path", ["/v1beta/models/g:generateContent", "/v1beta/models", "/v1/chat/completions"])
def test_a_credential_in_a_url_is_refused(path: str, query: str) -> None:
    with pytest.raises(BadRequest, match="ends up in logs") as caught:
        find(f"{path}?{query}")
    assert caught.value.code == "credential_in_url"


@pytest.mark.parametrize("query", ["keys=x", "monkey=x", "x=key", "KEY=x", "alt=sse&fields=key"])
def test_what_is_only_like_one_is_not(query: str) -> None:
    assert find(f"/v1beta/models/g:generateContent?{query}") is not None


def test_where_nothing_is_served_nothing_is_read() -> None:
    assert find("/v1beta/nothing?key=x") is None


@pytest.mark.parametrize(
    "query", ["alt=proto", "alt=media", "alt=SSE", "alt=", "alt=sse&alt=json", "alt=sse&$alt=json"]
)
def test_a_stream_in_no_known_form_is_refused(query: str) -> None:
    with pytest.raises(BadRequest) as caught:
        find(f"/v1beta/models/g:streamGenerateContent?{query}")
    assert caught.value.param == "alt"


# --- Whose error ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names", "dialect"),
    [
        ("/nothing", (), CHAT),
        ("/nothing", VERSIONED, CHAT),
        ("", (), CHAT),
        ("/v1/messagesx", (), CHAT),
        ("/v1beta1/models", (), CHAT),
        ("/v1/models/", (), CHAT),
        ("/v1/models/", VERSIONED, ANTHROPIC),
        ("/v1/models/", GOOGLES, GEMINI),
        ("/v1/models/g:generateContent?key=x", (), GEMINI),
        ("/v1/models/:generateContent", VERSIONED, GEMINI),
        ("/v1/models/g:predict", (), CHAT),
        ("/v1/modelsx", VERSIONED, CHAT),
        ("/nothing:generateContent", GOOGLES, CHAT),
        ("/v1/messages/batches", (), ANTHROPIC),
        ("/v1/messages/", (), ANTHROPIC),
        ("/v1/messages?x", (), ANTHROPIC),
        ("/v1beta", (), GEMINI),
        ("/v1beta/files?key=x", VERSIONED, GEMINI),
    ],
)
def test_speaker(path: str, names: tuple[str, ...], dialect: str) -> None:
    assert speaker(path, names).name == dialect


@pytest.mark.parametrize("path", [*CALLS, *LISTS], ids=str)
def test_the_speaker_is_of_the_endpoints_family(path: str) -> None:
    """An error before the endpoint is found reads like one after it."""
    family = speaker(path).name.partition("-")[0]
    assert endpoints.find(path) is not None
    assert found(path).dialect.name.partition("-")[0] == family
