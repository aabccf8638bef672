"""What a policy offers, and its lists as the official clients read them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import anthropic
import httpx
import httpx2
import openai
import orjson
import pytest
from google import genai
from google.genai import errors as google_errors
from google.genai import types as google_types

from extproc import endpoints, offers
from extproc.errors import NotFound, TollgateError
from extproc.limits import MAX_OFFERS
from extproc.offers import Offer, offered
from extproc.providers import PROVIDERS
from extproc.records import IdentityRules, ModelRule, Policy, Target

ALL = frozenset(PROVIDERS)
ORIGIN = "http://tollgate.test"


def policy(**rules: str) -> Policy:
    """`pattern="provider/model provider/model"`."""
    models = tuple(
        ModelRule(pattern, tuple(Target(*target.split("/", 1)) for target in targets.split()))
        for pattern, targets in rules.items()
    )
    return Policy("v", IdentityRules(("a",), ("i",), ("*",)), models, (), ())


def names(policy: Policy, *providers: str) -> dict[str, str]:
    return {offer.name: offer.owner for offer in offered(policy, frozenset(providers or ALL))}


# --- What is offered --------------------------------------------------------------------------------------------------


def test_a_name_is_offered_as_it_is() -> None:
    assert names(policy(**{"fast": "groq/x", "our-gpt": "openai/gpt-4o"})) == {"fast": "groq", "our-gpt": "openai"}


@pytest.mark.parametrize(
    ("providers", "expected"),
    [(("openai", "anthropic"), "openai"), (("anthropic",), "anthropic"), (("groq",), None)],
    ids=["both have a key", "the second has", "none has"],
)
def test_the_owner_is_who_is_asked_first(providers: tuple[str, ...], expected: str | None) -> None:
    chain = policy(**{"chat": "openai/gpt-4o anthropic/claude-sonnet-4-5"})
    assert names(chain, *providers).get("chat") == expected


def test_a_pattern_offers_what_is_known_at_its_provider() -> None:
    found = names(policy(**{"gpt-4o*": "openai/*"}))
    assert {"gpt-4o", "gpt-4o-mini", "gpt-4o-2024-05-13"} <= found.keys()
    assert all(name.startswith("gpt-4o") for name in found)
    assert set(found.values()) == {"openai"}
    assert list(found) == sorted(found)


def test_a_pattern_needs_its_provider() -> None:
    assert names(policy(**{"*": "openai/*"}), "anthropic") == {}


def test_of_a_chain_only_the_first_providers_names_can_be_called() -> None:
    """Another one's would be asked of the first, which does not know them."""
    found = names(policy(**{"*": "anthropic/* openai/*"}))
    assert set(found.values()) == {"anthropic"}
    assert all(name.startswith("claude") for name in found)


def test_a_pattern_to_one_model_offers_that_if_it_may_be_named() -> None:
    assert names(policy(**{"gpt-4*": "openai/gpt-4o"})) == {"gpt-4o": "openai"}
    assert names(policy(**{"claude-*": "openai/gpt-4o"})) == {}


def test_a_more_specific_rule_takes_its_names_out_of_a_pattern() -> None:
    found = names(policy(**{"*": "openai/*", "gpt-4*": "azure/ours", "gpt-4o": "anthropic/claude-sonnet-4-5"}))
    assert found["gpt-4o"] == "anthropic"
    assert not [name for name in found if name.startswith("gpt-4") and name != "gpt-4o"]
    assert found["o3"] == "openai"


def test_a_name_that_is_a_pattern_elsewhere_is_offered_once() -> None:
    found = offered(policy(**{"*": "openai/*", "gpt-4o": "openai/gpt-4o"}), ALL)
    assert [offer.name for offer in found].count("gpt-4o") == 1


@pytest.mark.parametrize("provider", sorted(ALL - {"azure", "local"}))
def test_no_provider_offers_what_is_not_served(provider: str) -> None:
    """By the words of it: no model that only speaks, hears, draws or moderates; nobody's own fine-tuned one."""
    found = names(policy(**{"*": f"{provider}/*"}))
    assert 1 <= len(found) <= MAX_OFFERS
    for word in ("tts", "whisper", "realtime", "transcribe", "image", "moderation", "-guard-", "ocr", "ft:", "batch"):
        assert not [name for name in found if word in name]


@pytest.mark.parametrize("provider", ["azure", "local"])
def test_deployments_have_their_customers_names(provider: str) -> None:
    assert names(policy(**{"*": f"{provider}/*", "mine": f"{provider}/m"})) == {"mine": provider}


def test_claude_and_gemini_are_apart_on_vertex() -> None:
    assert all("claude" not in name for name in names(policy(**{"*": "vertex/*"})))
    assert all("claude" in name for name in names(policy(**{"*": "vertex-anthropic/*"})))


def test_a_list_is_bounded_and_keeps_the_policys_own_names() -> None:
    many = {f"z-{number}": "openai/gpt-4o" for number in range(MAX_OFFERS - 1)}
    found = names(policy(**{"*": "openai/*"}, **many))
    assert len(found) == MAX_OFFERS
    assert many.keys() <= found.keys()


# --- As the official clients read it ----------------------------------------------------------------------------------

SOME = (
    Offer("claude-sonnet-4-5", "anthropic"),
    Offer("gpt-4o", "openai"),
    Offer("text-embedding-3-small", "openai"),
    Offer("vendor/model", "openrouter"),
)
CHATS = [offer.name for offer in SOME if offer.chats]


def gateway(
    method: str, path: str, names: Collection[str], some: tuple[Offer, ...]
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of its answer to a request for models, without all that comes before it."""
    endpoint = endpoints.find(path, names)
    assert endpoint is not None
    assert (endpoint.lists, endpoint.method) == (True, method)
    headers = {"content-type": "application/json"}
    try:
        return 200, headers, offers.render(endpoint.dialect.name, some, endpoint.address.model)
    except TollgateError as error:
        return error.status, headers, endpoint.dialect.render_error(error)


def client(some: tuple[Offer, ...]) -> httpx2.Client:
    """What OpenAI's and Anthropic's clients are built on."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        status, headers, body = gateway(request.method, request.url.raw_path.decode(), request.headers, some)
        return httpx2.Response(status, headers=headers, content=body)

    return httpx2.Client(transport=httpx2.MockTransport(answer))


def openais(some: tuple[Offer, ...] = SOME) -> openai.OpenAI:
    return openai.OpenAI(api_key="t", base_url=f"{ORIGIN}/v1", http_client=client(some), max_retries=0)


def anthropics(some: tuple[Offer, ...] = SOME) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="t", base_url=ORIGIN, http_client=client(some), max_retries=0)


def googles(some: tuple[Offer, ...] = SOME, version: str | None = None) -> genai.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        status, headers, body = gateway(request.method, request.url.raw_path.decode(), request.headers, some)
        return httpx.Response(status, headers=headers, content=body)

    transport = httpx.Client(transport=httpx.MockTransport(answer))
    options = google_types.HttpOptions(base_url=ORIGIN, httpx_client=transport, api_version=version)
    return genai.Client(api_key="t", http_options=options)


def test_openais_client() -> None:
    page = openais().models.list()
    assert [(model.id, model.owned_by, model.object) for model in page] == [
        (offer.name, offer.owner, "model") for offer in SOME
    ]
    assert openais().models.retrieve("text-embedding-3-small").id == "text-embedding-3-small"
    assert openais().models.retrieve("vendor/model").owned_by == "openrouter"
    assert openais().get("/models/vendor/model", cast_to=openai.types.Model).id == "vendor/model"


def test_anthropics_client() -> None:
    page = anthropics().models.list(limit=1)
    assert [model.id for model in page] == CHATS
    assert (page.has_more, page.first_id, page.last_id) == (False, CHATS[0], CHATS[-1])
    model = anthropics().models.retrieve("gpt-4o")
    assert (model.id, model.display_name, model.created_at.year, model.type) == ("gpt-4o", "gpt-4o", 1970, "model")


@pytest.mark.parametrize("version", [None, "v1beta"], ids=["its own choice", "v1beta"])
def test_googles_client(version: str | None) -> None:
    client = googles(version=version)
    found = list(client.models.list())
    assert [model.name for model in found] == [f"models/{name}" for name in CHATS]
    assert "generateContent" in (found[0].supported_actions or ())
    assert client.models.get(model="vendor/model").display_name == "vendor/model"
    assert client.models.get(model="models/gpt-4o").name == "models/gpt-4o"


def test_nothing_is_offered() -> None:
    assert list(openais(()).models.list()) == []
    page = anthropics(()).models.list()
    assert (list(page), page.first_id, page.last_id) == ([], None, None)
    assert list(googles(()).models.list()) == []


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda: openais().models.retrieve("gpt-9"), openai.NotFoundError),
        (lambda: anthropics().models.retrieve("gpt-9"), anthropic.NotFoundError),
        (lambda: anthropics().models.retrieve("text-embedding-3-small"), anthropic.NotFoundError),
        (lambda: googles().models.get(model="gpt-9"), google_errors.ClientError),
        (lambda: googles().models.get(model="text-embedding-3-small"), google_errors.ClientError),
    ],
    ids=["OpenAI", "Anthropic", "Anthropic, an embedding", "Google", "Google, an embedding"],
)
def test_an_unknown_model_is_404(ask: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error, match="is not offered by this gateway"):
        ask()


def test_an_unknown_name_is_quoted_and_short() -> None:
    with pytest.raises(NotFound) as caught:
        offers.render("openai-chat", SOME, "é" * 10_000)
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 2_000
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("dialect", ["openai-chat", "anthropic-messages", "gemini-generate"])
def test_a_list_is_json(dialect: str) -> None:
    assert orjson.loads(offers.render(dialect, SOME, None))
