"""envoy/envoy.yaml: what ops rely on, by Envoy's own types; what is rendered into it; and how mistakes are found."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from extproc import limits
from extproc.envoy_config import TEMPLATE, Places, chains, render
from extproc.local import envoy_types
from extproc.local.envoy_check import envoy_binary, problems
from extproc.local.valkey import free_port
from extproc.providers import PROVIDERS
from extproc.settings import Settings

TEXT = TEMPLATE.read_text()
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
LISTENER = CONFIG["static_resources"]["listeners"][0]
HCM = LISTENER["filter_chains"][0]["filters"][0]["typed_config"]
CLUSTERS = {cluster["name"]: cluster for cluster in CONFIG["static_resources"]["clusters"]}
HOSTS = {name: cluster for name, cluster in CLUSTERS.items() if "load_assignment" in cluster and name != "extproc"}
CHAINS = {name: cluster for name, cluster in CLUSTERS.items() if "cluster_type" in cluster}
ROUTES = {route["name"]: route for route in HCM["route_config"]["virtual_hosts"][0]["routes"]}
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
FILTERS = {one["name"]: one["typed_config"] for one in HCM["http_filters"]}
GATE = FILTERS["gate"]
SETTINGS = Settings.from_environment({})


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def options(cluster: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = cluster["typed_extension_protocol_options"][HTTP_OPTIONS]
    return found


def target(cluster: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = options(cluster)["http_filters"][0]["typed_config"]
    return found


def host(cluster: dict[str, Any]) -> dict[str, Any]:
    (found,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    return dict(found)


def members(chain: dict[str, Any]) -> list[str]:
    return [member["name"] for member in chain["cluster_type"]["typed_config"]["clusters"]]


def provider(cluster: str) -> str:
    return str(host(HOSTS[cluster])["metadata"]["filter_metadata"]["tollgate"]["provider"])


def led_to(asked_for: str) -> tuple[str, dict[str, Any]]:
    """The cluster and the retry policy of a request for these providers, as Envoy finds them: the first match."""
    for route in ROUTES.values():
        (header,) = route["match"].get("headers", [{"name": "", "string_match": {"exact": asked_for}}])
        match header["string_match"]:
            case {"exact": text}:
                matches = text == asked_for
            case {"safe_regex": {"regex": regex}}:
                matches = re.fullmatch(regex, asked_for) is not None
        if matches:
            action = route["route"]
            return action.get("cluster", asked_for), action["retry_policy"]
    raise AssertionError(asked_for)


# The file as it is ----------------------------------------------------------------------------------------------------


def test_the_real_envoy_takes_it_and_no_name_occurs_twice() -> None:
    assert problems() == []


def test_every_field_is_one_of_envoys_types() -> None:
    """By envoy-data-plane's types, every typed_config by its own: no unknown field, no value of another type."""
    assert envoy_types.problems(TEXT) == []


def test_the_types_know_the_same_defaults(walked: list[tuple[str, dict[str, Any]]]) -> None:
    """Each typed_config goes through its betterproto message and comes back as it was written."""
    assert len(walked) >= 10
    for url, value in walked:
        message = envoy_types._class(url.removeprefix("type.googleapis.com/"))
        parsed = message.from_dict(value)
        again = message.parse(bytes(parsed))
        assert again == parsed, url


@pytest.fixture
def walked() -> list[tuple[str, dict[str, Any]]]:
    def walk(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, list):
            for item in value:
                yield from walk(item)
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
            if "@type" in value:
                yield value["@type"], {name: item for name, item in value.items() if name != "@type"}

    return list(walk(CONFIG))


def test_the_admin_interface_is_on_loopback_only() -> None:
    assert CONFIG["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_the_body_limit_is_the_processors() -> None:
    assert LISTENER["per_connection_buffer_limit_bytes"] == limits.MAX_REQUEST_BYTES == 32 * 2**20
    windows = options(CLUSTERS["extproc"])["explicit_http_config"]["http2_protocol_options"]
    assert windows["initial_stream_window_size"] >= limits.MAX_MESSAGE_BYTES


def test_no_watermark_towards_the_processor_which_envoy_would_die_of() -> None:
    assert CLUSTERS["extproc"]["per_connection_buffer_limit_bytes"] == 0


def test_connections_are_limited() -> None:
    (monitor,) = CONFIG["overload_manager"]["resource_monitors"]
    assert monitor["name"] == "envoy.resource_monitors.global_downstream_max_connections"
    assert 0 < monitor["typed_config"]["max_active_downstream_connections"] <= 100_000


def test_paths_have_one_spelling() -> None:
    assert HCM["normalize_path"] is True
    assert HCM["merge_slashes"] is True
    assert HCM["path_with_escaped_slashes_action"] == "REJECT_REQUEST"


def test_headers_that_are_trusted_are_stripped_on_the_way_in() -> None:
    (extension,) = HCM["early_header_mutation_extensions"]
    mutations = extension["typed_config"]["mutations"]
    *reserved, googles = [m["remove_on_match"]["key_matcher"] for m in mutations if "remove_on_match" in m]
    assert mutations[0]["append"] == {
        "header": {"key": "x-api-key", "value": "%REQ(x-goog-api-key)%"},
        "append_action": "ADD_IF_ABSENT",
    }, "before its own header is removed"
    assert reserved == [{"prefix": prefix, "ignore_case": True} for prefix in ("x-tollgate-internal-", "x-envoy-")]
    names = ("api-key", "api-client", "authenticated-user-email", "iap-jwt-assertion", "user-project", "request-params")
    stripped = {name for name in names if re.fullmatch(googles["safe_regex"]["regex"], f"x-goog-{name}")}
    assert set(names) - stripped == {"api-client"}
    assert {"remove": "x-request-id"} in mutations
    assert HCM["use_remote_address"] is True
    assert HCM["preserve_external_request_id"] is False
    assert HCM["common_http_protocol_options"]["headers_with_underscores_action"] == "DROP_HEADER"


def test_no_trailer_of_a_caller_passes() -> None:
    (mutation,) = FILTERS["hygiene"]["mutations"]["request_trailers_mutations"]
    assert mutation == {"remove_on_match": {"key_matcher": {"safe_regex": {"regex": ".*"}}}}


def test_a_stream_has_no_total_time_but_silence_is_bounded() -> None:
    for route in ROUTES.values():
        if route["name"] != "undecided":
            assert route["route"]["timeout"] == "0s"
            assert "idle_timeout" not in route["route"], "the listener's"
    assert 0 < seconds(HCM["stream_idle_timeout"]) <= 610
    for bound in ("request_timeout", "request_headers_timeout", "stream_flush_timeout"):
        assert 0 < seconds(HCM[bound]) <= 60


def test_what_was_not_decided_goes_nowhere() -> None:
    *others, last = ROUTES.values()
    assert last["direct_response"] == {"status": 503}
    for route in others:
        (header,) = route["match"]["headers"]
        assert header["name"] == "x-tollgate-internal-route"


def test_the_access_log_is_json_without_any_header_that_may_carry_a_credential() -> None:
    (log,) = HCM["access_log"]
    fields = log["typed_config"]["log_format"]["json_format"]
    read = {name for value in fields.values() for name in re.findall(r"%(?:REQ|RESP|TRAILER)\(([^)]*)\)", value)}
    assert read == {"x-request-id", ":method"}
    assert fields["path"] == "%DYNAMIC_METADATA(tollgate:path):256%"
    path = FILTERS["caller"]["request_rules"][1]["on_header_present"]["regex_value_rewrite"]
    assert re.sub(path["pattern"]["regex"], path["substitution"], "/v1/x?key=secret?a=b") == "/v1/x"


@pytest.mark.parametrize("filter_config", [GATE, *map(target, CHAINS.values())])
def test_a_filter_fails_closed(filter_config: dict[str, Any]) -> None:
    assert filter_config["failure_mode_allow"] is False
    assert filter_config["status_on_error"] == {"code": "ServiceUnavailable"}
    assert "observability_mode" not in filter_config


def test_the_gate_sees_what_the_exchange_expects() -> None:
    assert GATE["processing_mode"] == {
        "request_header_mode": "SEND",
        "request_body_mode": "BUFFERED",
        "request_trailer_mode": "SKIP",
        "response_header_mode": "SEND",
        "response_body_mode": "STREAMED",
        "response_trailer_mode": "SEND",
    }
    assert GATE["grpc_service"]["initial_metadata"] == [{"key": "x-tollgate-role", "value": "gate"}]
    assert GATE.get("allow_mode_override", False) is False
    assert list(FILTERS) == ["caller", "hygiene", "gate", "router"]


def test_the_processors_deadlines_come_before_envoys() -> None:
    admission_s = SETTINGS.admission_timeout_ms / 1000
    assert admission_s < seconds(GATE["message_timeout"])
    assert SETTINGS.ledger_timeout_ms < SETTINGS.admission_timeout_ms
    # A chunk may wait for one extension that was asked for too early, and for the one after it.
    assert 2 * SETTINGS.ledger_timeout_ms / 1000 < seconds(GATE["message_timeout"])


# Providers and chains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(HOSTS) - {"local"}))
def test_a_provider_is_reached_over_verified_tls(name: str) -> None:
    socket = HOSTS[name]["transport_socket"]["typed_config"]
    assert socket["@type"].endswith(".UpstreamTlsContext")
    assert socket["auto_host_sni"] is True
    assert socket["auto_sni_san_validation"] is True
    common = socket["common_tls_context"]
    assert common["validation_context"]["trusted_ca"]["filename"] == "/etc/ssl/certs/ca-certificates.crt"
    assert common["tls_params"]["tls_minimum_protocol_version"] in ("TLSv1_2", "TLSv1_3")
    assert options(HOSTS[name])["auto_config"]["http2_protocol_options"]["connection_keepalive"], "as ALPN agrees"


@pytest.mark.parametrize("name", HOSTS)
class TestProvider:
    def test_has_pooled_connections(self, name: str) -> None:
        assert HOSTS[name]["upstream_connection_options"]["tcp_keepalive"]
        assert seconds(options(HOSTS[name])["common_http_protocol_options"]["idle_timeout"]) > 0

    def test_is_bounded(self, name: str) -> None:
        (thresholds,) = HOSTS[name]["circuit_breakers"]["thresholds"]
        assert {"max_connections", "max_pending_requests", "max_requests"} <= set(thresholds)
        assert 0 < seconds(HOSTS[name]["connect_timeout"]) <= 10

    def test_is_at_the_address_that_the_settings_have(self, name: str) -> None:
        endpoint = host(HOSTS[name])["endpoint"]
        address = endpoint["address"]["socket_address"]
        assert address["address"] == endpoint["hostname"]
        base_url = PROVIDERS[provider(name)].base_url
        if base_url is not None:
            url = urlsplit(base_url)
            assert (url.hostname, url.port or 443) == (address["address"], address["port_value"])

    def test_is_left_out_only_where_another_one_follows(self, name: str) -> None:
        outliers = HOSTS[name].get("outlier_detection")
        assert (outliers is not None) == name.endswith("-if-well")
        if outliers is not None:
            assert outliers["consecutive_5xx"] > 0
            assert outliers["max_ejection_percent"] == 100, "of one: below, Envoy leaves out nobody"
            assert HOSTS[name]["common_lb_config"]["healthy_panic_threshold"]["value"] == 0


def test_every_provider_has_a_cluster_of_its_name() -> None:
    assert {provider(name) for name in HOSTS} == set(PROVIDERS)
    assert {name: provider(name) for name in PROVIDERS} == {name: name for name in PROVIDERS}


def test_an_address_that_ops_must_write_is_nobodys() -> None:
    assert host(HOSTS["azure"])["endpoint"]["hostname"].endswith(".invalid")


@pytest.mark.parametrize("name", sorted(set(CHAINS) - {"waiting"}))
def test_a_chain_asks_its_providers_in_order_and_the_last_one_always(name: str) -> None:
    asked = [provider(member) for member in members(CHAINS[name])]
    if name.endswith("-alone"):
        one = name.removesuffix("-alone")
        assert members(CHAINS[name]) == [one, one]
        assert led_to(one)[0] == led_to(f"{one},no-such-chain")[0] == name
        policy = led_to(one)[1]
    else:
        assert asked == name.split(",")
        assert [member.endswith("-if-well") for member in members(CHAINS[name])] == [True] * (len(asked) - 1) + [False]
        cluster, policy = led_to(name)
        assert cluster == name
    assert policy["num_retries"] == len(asked) - 1, "a try beyond the chain hides the last answer"
    conditions = set(policy["retry_on"].split(","))
    assert {"connect-failure", "refused-stream", "reset", "5xx"} <= conditions
    if name.endswith("-alone"):
        assert "per_try_timeout" not in policy, "a whole answer that took too long may be billed"
    else:
        assert policy["retriable_status_codes"] == [429]
        assert seconds(policy["per_try_timeout"]) * len(asked) <= seconds(HCM["stream_idle_timeout"])
    assert CHAINS[name]["circuit_breakers"]["thresholds"][0]["max_retries"] > 0


@pytest.mark.parametrize(("retry_after", "again"), [("0", True), ("2", True), ("3", False), ("20", False), ("", False)])
def test_alone_a_short_wait_that_the_provider_asks_for_is_waited(retry_after: str, again: bool) -> None:
    _, policy = led_to("openai")
    (header,) = policy["retriable_headers"]
    assert header["name"] == "retry-after"
    assert (re.fullmatch(header["string_match"]["safe_regex"]["regex"], retry_after) is not None) == again
    assert seconds(policy["rate_limited_retry_back_off"]["max_interval"]) == 2


def test_nothing_undecided_is_led_anywhere() -> None:
    for asked_for in ("", "open", "openai2", "x-openai", "openai-alone", "extproc"):
        with pytest.raises(KeyError, match="route"):
            led_to(asked_for)


def test_the_chains_that_are_offered() -> None:
    assert chains(TEXT) == {tuple(name.split(",")) for name in CHAINS if "," in name} | {(name,) for name in PROVIDERS}
    for chain in (
        ("openai", "anthropic"),
        ("gemini", "anthropic", "openai"),
        ("vertex", "gemini"),
        ("azure", "openai"),
    ):
        assert chain in chains(TEXT)


def test_a_route_to_a_chain_that_is_not_there_offers_nothing() -> None:
    without = TEXT.replace('- name: "openai,azure"\n      lb_policy', '- name: "other"\n      lb_policy')
    assert without != TEXT
    assert chains(TEXT) - chains(without) == {("openai", "azure")}


@pytest.mark.parametrize("name", CHAINS)
class TestAttempt:
    def test_knows_its_provider_and_what_the_gate_decided(self, name: str) -> None:
        assert target(CHAINS[name])["request_attributes"] == ["xds.upstream_host_metadata"]
        assert target(CHAINS[name])["metadata_options"] == {"forwarding_namespaces": {"untyped": ["tollgate"]}}
        assert GATE["metadata_options"] == {"receiving_namespaces": {"untyped": ["tollgate"]}}

    def test_goes_through_the_target_and_says_nothing_in_envoys_name(self, name: str) -> None:
        filters = options(CHAINS[name])["http_filters"]
        assert [one["name"] for one in filters] == ["target", "no_forgery", "codec"]
        (removed,) = filters[1]["typed_config"]["mutations"]["response_mutations"]
        assert removed["remove_on_match"]["key_matcher"] == {"prefix": "x-tollgate-internal-", "ignore_case": True}

    def test_sends_bodies_to_the_processor_only_where_it_asks_or_the_chain_waits(self, name: str) -> None:
        config = target(CHAINS[name])
        role = config["grpc_service"]["initial_metadata"][0]["value"]
        bodies = [config["processing_mode"][f"{side}_body_mode"] for side in ("request", "response")]
        assert "BUFFERED" not in bodies[1], "above 16 MiB Envoy would die of it"
        if name == "waiting":
            assert (role, bodies) == ("target-first-event", ["BUFFERED", "STREAMED"])
            assert config["send_body_without_waiting_for_header_response"] is True
            assert seconds(config["max_message_timeout"]) > seconds(HCM["stream_idle_timeout"])
        else:
            assert (role, bodies) == ("target", ["NONE", "NONE"])
            assert config["allow_mode_override"] is True


def test_the_gate_is_told_who_answered_and_the_caller_is_not() -> None:
    (added,) = HCM["route_config"]["virtual_hosts"][0]["response_headers_to_add"]
    assert added == {
        "header": {"key": "x-tollgate-internal-provider", "value": "%UPSTREAM_METADATA(tollgate:provider)%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
    removed = [one["remove_on_match"]["key_matcher"] for one in FILTERS["hygiene"]["mutations"]["response_mutations"]]
    assert removed == [{"prefix": name, "ignore_case": True} for name in ("x-tollgate-internal-", "x-envoy-")]
    assert list(FILTERS).index("hygiene") < list(FILTERS).index("gate"), "answers pass the filters backwards"


# As it runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The real Envoy without a processor, which refuses everything by itself: its URL, and its log."""
    directory = tmp_path_factory.mktemp("envoy")
    port = free_port()
    text = render(Places(port, free_port(), [directory / "nobody"], {"openai": "http://127.0.0.1:1/v1"}))
    (directory / "envoy.yaml").write_text(text)
    log = directory / "envoy.log"
    command = [envoy_binary(), "--config-path", str(directory / "envoy.yaml"), "--log-level", "off"]
    options = ["--concurrency", "1", "--use-dynamic-base-id", "--file-flush-interval-msec", "20"]
    with log.open("wb") as out, subprocess.Popen([*command, *options], stdout=out, stderr=out) as envoy:
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.TransportError:
                assert envoy.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}", log
        envoy.kill()


OPENAIS = {"message": "The request could not be passed on.", "param": None} | dict.fromkeys(
    ("type", "code"), "service_unavailable"
)
GOOGLES = {"code": 503, "message": OPENAIS["message"], "status": "UNAVAILABLE"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", {"error": OPENAIS}),
        ("/v1/messages?beta=true", {"type": "error", "error": {"type": "api_error", "message": OPENAIS["message"]}}),
        ("/v1beta/models/x:generateContent?key=AIza-secret", {"error": GOOGLES}),
        ("/v1/models/x:generateContent?key=AIza-secret", {"error": GOOGLES}),
        ("/v1/models/x", {"error": OPENAIS}),
        ("/nothing", {"error": OPENAIS}),
    ],
    ids=["OpenAI", "Anthropic", "Google", "Google's newer clients", "OpenAI's models", "no API"],
)
def test_envoys_own_refusals_are_in_the_callers_api(
    alone: tuple[str, Path], path: str, expected: dict[str, Any]
) -> None:
    url, log = alone
    answer = httpx.post(f"{url}{path}", json={})
    told = answer.json()
    assert told.pop("request_id", answer.headers["x-request-id"]) == answer.headers["x-request-id"]
    assert (answer.status_code, told) == (503, expected)
    lines: list[str] = []
    while not lines:  # the line is written a moment after the answer
        lines = [line for line in log.read_text().splitlines() if answer.headers["x-request-id"] in line]
    assert json.loads(lines[0])["path"] == path.partition("?")[0]
    assert "secret" not in lines[0]


# Rendered -------------------------------------------------------------------------------------------------------------

SOCKETS = [Path("/run/a.sock"), Path("/run/b.sock")]


def difference(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """What differs, by its path: the value afterwards, or None for what is gone."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, Any] = {}
        for name in {**before, **after}:
            found |= difference(before.get(name), after.get(name), f"{path}/{name}")
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        found = {}
        for i, pair in enumerate(zip(before, after, strict=True)):
            found |= difference(*pair, f"{path}/{i}")
        return found
    return {} if before == after else {path: after}


BASE_URLS = {name: f"https://{host(cluster)['endpoint']['hostname']}" for name, cluster in HOSTS.items()} | {
    "local": "http://127.0.0.1:8000/v1"
}


def rendered(trusted_ca: Path | None = None, **base_urls: str) -> dict[str, Any]:
    places = Places(1234, 5678, SOCKETS, BASE_URLS | base_urls, trusted_ca)
    return difference(CONFIG, yaml.safe_load(render(places)))


POSITIONS = {cluster["name"]: i for i, cluster in enumerate(CONFIG["static_resources"]["clusters"])}
OPENAI = [f"/static_resources/clusters/{POSITIONS[name]}" for name in ("openai", "openai-if-well")]
ENDPOINT = "load_assignment/endpoints/0/lb_endpoints/0/endpoint"
OWN_PLACES = {
    "/admin/address/socket_address/port_value": 5678,
    "/static_resources/listeners/0/address/socket_address/address": "127.0.0.1",
    "/static_resources/listeners/0/address/socket_address/port_value": 1234,
    f"/static_resources/clusters/{POSITIONS['extproc']}/load_assignment/endpoints/0/lb_endpoints": [
        {"endpoint": {"address": {"pipe": {"path": str(path)}}}} for path in SOCKETS
    ],
}


def address(cluster: str, hostname: str, port: int) -> dict[str, Any]:
    """What differs where a cluster's address does."""
    before = host(HOSTS[cluster])["endpoint"]
    after = {"hostname": hostname, "address": {"socket_address": {"address": hostname, "port_value": port}}}
    return difference(before, after, f"/static_resources/clusters/{POSITIONS[cluster]}/{ENDPOINT}")


def test_rendering_changes_addresses_and_nothing_else() -> None:
    assert rendered() == OWN_PLACES


def test_an_https_base_url_changes_the_name_and_keeps_tls() -> None:
    assert rendered(openai="https://llm.example:8443/api/v1") == {
        **OWN_PLACES,
        **address("openai", "llm.example", 8443),
        **address("openai-if-well", "llm.example", 8443),
    }


def test_a_trusted_ca_of_its_own_takes_the_place_of_the_systems() -> None:
    context = "transport_socket/typed_config/common_tls_context/validation_context/trusted_ca/filename"
    secure = [POSITIONS[name] for name, cluster in HOSTS.items() if "transport_socket" in cluster]
    assert rendered(Path("/ca.pem")) == OWN_PLACES | {
        f"/static_resources/clusters/{position}/{context}": "/ca.pem" for position in secure
    }


def test_an_http_base_url_takes_tls_away_and_with_it_alpn() -> None:
    places = Places(1234, 5678, SOCKETS, BASE_URLS | {"openai": "http://10.0.0.1/v1"})
    clusters = {one["name"]: one for one in yaml.safe_load(render(places))["static_resources"]["clusters"]}
    for name in ("openai", "openai-if-well"):
        assert "transport_socket" not in clusters[name]
        assert options(clusters[name]) == options(CLUSTERS["local"])
        assert host(clusters[name])["endpoint"]["address"] == {
            "socket_address": {"address": "10.0.0.1", "port_value": 80}
        }
    assert clusters["anthropic"] == CLUSTERS["anthropic"]


def test_an_https_base_url_gives_tls_to_a_server_of_ones_own() -> None:
    places = Places(1234, 5678, SOCKETS, BASE_URLS | {"local": "https://vllm.example/v1"})
    clusters = {one["name"]: one for one in yaml.safe_load(render(places))["static_resources"]["clusters"]}
    assert clusters["local"]["transport_socket"] == CLUSTERS["openai"]["transport_socket"]
    assert options(clusters["local"]) == options(CLUSTERS["openai"])


def test_a_provider_without_a_base_url_is_left_out_with_its_chains() -> None:
    text = render(Places(1, 2, SOCKETS, {"openai": "http://127.0.0.1:3/v1", "anthropic": "http://127.0.0.1:4"}))
    assert chains(text) == {("openai",), ("anthropic",), ("openai", "anthropic"), ("anthropic", "openai")}
    clusters = [one["name"] for one in yaml.safe_load(text)["static_resources"]["clusters"]]
    assert set(clusters) == {
        *("openai", "openai-if-well", "openai-alone", "anthropic", "anthropic-if-well", "anthropic-alone"),
        *("openai,anthropic", "anthropic,openai", "waiting", "extproc"),
    }


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:1/v1", "https://localhost:2/v1"])
def test_envoy_takes_what_is_rendered(base_url: str, tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    path.write_text(render(Places(port=1, admin_port=2, sockets=SOCKETS, base_urls={"openai": base_url})))
    assert problems(path) == []


# Mistakes -------------------------------------------------------------------------------------------------------------

TYPED = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config"


def line_of(text: str) -> int:
    return TEXT[: TEXT.index(text)].count("\n") + 1


@pytest.mark.parametrize(
    ("right", "wrong", "envoys_word", "typed"),
    [
        (
            "normalize_path: true",
            "normalise_path: true",
            "no such field: 'normalise_path'",
            f"{TYPED}.normalise_path: there is no such field in HttpConnectionManager",
        ),
        (
            "codec_type: AUTO",
            "codec_type: AUTOMATIC",
            "unknown enum value: 'AUTOMATIC'",
            f"{TYPED}.codec_type: must be one of AUTO, HTTP1, HTTP2, HTTP3, not AUTOMATIC",
        ),
        (
            "request_timeout: 60s",
            "request_timeout: soon",
            "duration must start with an integer",
            f"{TYPED}.request_timeout: must be a duration, such as 0.5s",
        ),
        (
            "max_headers_count: 100",
            "max_headers_count: many",
            "invalid number: 'many'",
            f"{TYPED}.common_http_protocol_options.max_headers_count: must be a whole number, not many",
        ),
        (
            "skip_xff_append: true",
            "skip_xff_append: perhaps",
            "skip_xff_append",
            f"{TYPED}.skip_xff_append: must be true or false, not perhaps",
        ),
        ("server_name: tollgate", "server_name: [1]", "server_name", f"{TYPED}.server_name: must be a single value"),
        (
            "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "extensions.filters.network.http_connection_manager.v3.Manager",
            "could not find @type",
            f"{TYPED}: there is no type "
            "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.Manager",
        ),
        (
            "connection_keepalive: {interval: 30s, timeout: 5s}",
            "connection_keepalive: {interval: 30s, patience: 5s}",
            "no such field: 'patience'",
            f"static_resources.clusters[0].typed_extension_protocol_options[{HTTP_OPTIONS}].auto_config."
            "http2_protocol_options.connection_keepalive.patience: there is no such field in KeepaliveSettings",
        ),
    ],
)
def test_a_wrong_field_is_found_with_its_line(
    right: str, wrong: str, envoys_word: str, typed: str, tmp_path: Path
) -> None:
    path = tmp_path / "envoy.yaml"
    path.write_text(TEXT.replace(right, wrong, 1))
    assert TEXT.count(right) >= 1
    envoys, *located = problems(path)
    assert envoys.startswith(f"{path}: Envoy refuses it: ")
    assert envoys_word in envoys
    assert "\n" not in envoys
    assert "{" not in envoys, "the whole configuration is not part of the reason"
    assert located == [f"{path}:{line_of(right)}: {typed}"]


@pytest.mark.parametrize(
    ("right", "wrong", "envoys_word"),
    [
        ("cluster: openai-alone\n", "cluster: nowhere\n", "unknown cluster 'nowhere'"),
        ("connect_timeout: 1s", "connect_timeout: 0s", "ConnectTimeout: value must be greater than 0s"),
        ("stat_prefix: ingress", 'stat_prefix: ""', "StatPrefix: value length must be at least 1 characters"),
        ("%PROTOCOL%", "%PROTOCL%", "PROTOCL"),
        ("code_details.startsWith", "code_details.(startsWith", "Syntax error"),
    ],
)
def test_what_only_envoy_knows_is_said_in_its_words(right: str, wrong: str, envoys_word: str, tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    path.write_text(TEXT.replace(right, wrong, 1))
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: Envoy refuses it: ")
    assert envoys_word in problem
    assert "\n" not in problem
    assert len(problem) < 800


def test_a_name_that_occurs_twice_is_found_although_envoy_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    path.write_text(TEXT.replace("merge_slashes: true", "merge_slashes: true\n                merge_slashes: false"))
    assert problems(path) == [f"{path}:{line_of('merge_slashes: true') + 1}: merge_slashes: it occurs twice"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1\nb: 2\n", ":2: expected ',' or ']', but got ':'"),
        (b"\xff\xfe\xfa", ": the file is not UTF-8 at byte 0"),
        (
            b"a: \x01",
            ': unacceptable character #x0001: special characters are not allowed in "<unicode string>", position 3',
        ),
        (b"", ": Envoy refuses it: Unable to convert YAML as JSON:"),
        (b"- a\n", ":1: : must be an object"),
        (None, ": No such file or directory"),
    ],
    ids=["syntax", "encoding", "control character", "empty", "list", "absent"],
)
def test_what_is_no_configuration_at_all(content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    if content is not None:
        path.write_bytes(content)
    assert problems(path)[-1] == f"{path}{expected}"


def test_without_the_types_envoy_alone_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(text: str) -> list[str]:
        raise ImportError

    monkeypatch.setattr(envoy_types, "problems", absent)
    path = tmp_path / "envoy.yaml"
    path.write_text(TEXT.replace("normalize_path", "normalise_path"))
    (problem,) = problems(path)
    assert "normalise_path" in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"admin": {"address": 1}}, "line 1: admin.address: must be an object"),
        ({"admin": {"adress": {}}}, "line 1: admin.adress: there is no such field in Admin"),
        ({"staticResources": {"listeners": {}}}, "line 1: staticResources.listeners: must be a list"),
        ({"node": {"id": 5}}, "line 1: node.id: must be a text (in quotes), not 5"),
        ({"node": {"id": "5", "metadata": {"any": ["thing", 1]}}}, None),
        ({"static_resources": {"clusters": [{"typed_extension_protocol_options": []}]}}, "must be an object"),
        ({"static_resources": {"clusters": [{"outlier_detection": {"consecutive_5xx": -1}}]}}, "a whole number from 0"),
        ({"stats_flush_interval": None}, None),
        ({"overload_manager": {"resource_monitors": [{"typed_config": {}}]}}, 'must have a "@type"'),
    ],
)
def test_the_types_alone(change: dict[str, Any], expected: str | None) -> None:
    found = envoy_types.problems(yaml.safe_dump(copy.deepcopy(change), default_flow_style=True, width=1000))
    assert (expected is None and found == []) or (expected is not None and expected in found[0])


def test_the_binary_is_the_pinned_one() -> None:
    assert Path(envoy_binary()).exists()
    assert TEMPLATE.name == "envoy.yaml"
