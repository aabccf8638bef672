"""envoy/envoy.yaml: what ops rely on, by Envoy's own types; what is rendered into it; and how mistakes are found."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc import limits
from extproc.local import envoy_config, envoy_types
from extproc.local.envoy_config import TEMPLATE, Places, envoy_binary, problems, render
from extproc.settings import PROVIDER_BASE_URLS, Settings

TEXT = TEMPLATE.read_text()
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
LISTENER = CONFIG["static_resources"]["listeners"][0]
HCM = LISTENER["filter_chains"][0]["filters"][0]["typed_config"]
CLUSTERS = {cluster["name"]: cluster for cluster in CONFIG["static_resources"]["clusters"]}
PROVIDERS = {name: cluster for name, cluster in CLUSTERS.items() if name != "extproc"}
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
    prefixes = {m["remove_on_match"]["key_matcher"]["prefix"] for m in mutations if "remove_on_match" in m}
    assert prefixes == {"x-tollgate-internal-", "x-envoy-", "x-goog-"}
    assert all(m["remove_on_match"]["key_matcher"]["ignore_case"] for m in mutations if "remove_on_match" in m)
    assert {"remove": "x-request-id"} in mutations
    assert HCM["use_remote_address"] is True
    assert HCM["preserve_external_request_id"] is False
    assert HCM["common_http_protocol_options"]["headers_with_underscores_action"] == "DROP_HEADER"


def test_no_trailer_of_a_caller_passes() -> None:
    (mutation,) = FILTERS["no_trailers"]["mutations"]["request_trailers_mutations"]
    assert mutation == {"remove_on_match": {"key_matcher": {"safe_regex": {"regex": ".*"}}}}


def test_a_stream_has_no_total_time_but_silence_is_bounded() -> None:
    routes = {route["name"]: route for route in HCM["route_config"]["virtual_hosts"][0]["routes"]}
    assert set(routes) == {*PROVIDERS, "undecided"}
    for name in PROVIDERS:
        route = routes[name]["route"]
        assert route["timeout"] == "0s"
        assert 0 < seconds(route["idle_timeout"]) <= 610
        assert 0 < seconds(route["retry_policy"]["per_try_idle_timeout"]) <= seconds(route["idle_timeout"])
        assert "5xx" not in route["retry_policy"]["retry_on"], "what a provider may have billed is not asked again"
    assert 0 < seconds(HCM["stream_idle_timeout"]) <= 610
    for bound in ("request_timeout", "request_headers_timeout", "stream_flush_timeout"):
        assert 0 < seconds(HCM[bound]) <= 60


def test_what_was_not_decided_goes_nowhere() -> None:
    last = HCM["route_config"]["virtual_hosts"][0]["routes"][-1]
    assert last["direct_response"] == {"status": 503}
    for route in HCM["route_config"]["virtual_hosts"][0]["routes"][:-1]:
        (header,) = route["match"]["headers"]
        assert header["name"] == "x-tollgate-internal-route"


def test_the_access_log_is_json_without_any_header_that_may_carry_a_credential() -> None:
    (log,) = HCM["access_log"]
    fields = log["typed_config"]["log_format"]["json_format"]
    read = {name for value in fields.values() for name in re.findall(r"%(?:REQ|RESP|TRAILER)\(([^)]*)\)", value)}
    assert read == {"x-request-id", ":method"}
    assert fields["path"].startswith("%PATH(NQ:"), "without the query"


@pytest.mark.parametrize("filter_config", [GATE, *map(target, PROVIDERS.values())])
def test_a_filter_fails_closed(filter_config: dict[str, Any]) -> None:
    assert filter_config["failure_mode_allow"] is False
    assert filter_config["status_on_error"] == {"code": "ServiceUnavailable"}
    assert "observability_mode" not in filter_config
    assert filter_config.get("allow_mode_override", False) is False


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
    assert list(FILTERS) == ["request_id", "no_trailers", "gate", "router"]


def test_the_processors_deadlines_come_before_envoys() -> None:
    admission_s = SETTINGS.admission_timeout_ms / 1000
    assert admission_s < seconds(GATE["message_timeout"])
    assert SETTINGS.ledger_timeout_ms < SETTINGS.admission_timeout_ms
    # A chunk may wait for one extension that was asked for too early, and for the one after it.
    assert 2 * SETTINGS.ledger_timeout_ms / 1000 < seconds(GATE["message_timeout"])


@pytest.mark.parametrize("name", PROVIDERS)
class TestProvider:
    def test_is_reached_over_verified_tls(self, name: str) -> None:
        socket = PROVIDERS[name]["transport_socket"]["typed_config"]
        assert socket["@type"].endswith(".UpstreamTlsContext")
        assert socket["auto_host_sni"] is True
        assert socket["auto_sni_san_validation"] is True
        common = socket["common_tls_context"]
        assert common["validation_context"]["trusted_ca"]["filename"] == "/etc/ssl/certs/ca-certificates.crt"
        assert common["tls_params"]["tls_minimum_protocol_version"] in ("TLSv1_2", "TLSv1_3")

    def test_speaks_what_alpn_agrees_on_over_pooled_connections(self, name: str) -> None:
        assert "http2_protocol_options" in options(PROVIDERS[name])["auto_config"]
        assert options(PROVIDERS[name])["auto_config"]["http2_protocol_options"]["connection_keepalive"]
        assert PROVIDERS[name]["upstream_connection_options"]["tcp_keepalive"]
        assert seconds(options(PROVIDERS[name])["common_http_protocol_options"]["idle_timeout"]) > 0

    def test_is_bounded_and_left_out_when_it_keeps_failing(self, name: str) -> None:
        (thresholds,) = PROVIDERS[name]["circuit_breakers"]["thresholds"]
        assert {"max_connections", "max_pending_requests", "max_requests", "max_retries"} <= set(thresholds)
        outliers = PROVIDERS[name]["outlier_detection"]
        assert outliers["consecutive_gateway_failure"] > 0
        assert outliers["max_ejection_percent"] < 100
        assert 0 < seconds(PROVIDERS[name]["connect_timeout"]) <= 10

    def test_has_a_target_that_sees_no_body_and_knows_its_provider(self, name: str) -> None:
        mode = target(PROVIDERS[name])["processing_mode"]
        assert mode["request_body_mode"] == mode["response_body_mode"] == "NONE"
        assert target(PROVIDERS[name])["request_attributes"] == ["xds.upstream_host_metadata"]
        (host,) = PROVIDERS[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert host["metadata"]["filter_metadata"]["tollgate"] == {"provider": name}
        assert [one["name"] for one in options(PROVIDERS[name])["http_filters"]] == ["target", "codec"]

    def test_is_at_the_address_that_the_settings_have(self, name: str) -> None:
        (host,) = PROVIDERS[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address = host["endpoint"]["address"]["socket_address"]
        assert PROVIDER_BASE_URLS[name].startswith(f"https://{host['endpoint']['hostname']}")
        assert address == {"address": host["endpoint"]["hostname"], "port_value": 443}


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


def rendered(base_url: str | None, trusted_ca: Path | None = None) -> dict[str, Any]:
    base_urls = {} if base_url is None else {"openai": base_url}
    text = render(Places(port=1234, admin_port=5678, sockets=SOCKETS, base_urls=base_urls, trusted_ca=trusted_ca))
    return difference(CONFIG, yaml.safe_load(text))


OPENAI = "/static_resources/clusters/0"
HOST = f"{OPENAI}/load_assignment/endpoints/0/lb_endpoints/0/endpoint"
OWN_PLACES = {
    "/admin/address/socket_address/port_value": 5678,
    "/static_resources/listeners/0/address/socket_address/address": "127.0.0.1",
    "/static_resources/listeners/0/address/socket_address/port_value": 1234,
    "/static_resources/clusters/1/load_assignment/endpoints/0/lb_endpoints": [
        {"endpoint": {"address": {"pipe": {"path": str(path)}}}} for path in SOCKETS
    ],
}


def test_rendering_changes_addresses_and_nothing_else() -> None:
    assert rendered(None) == OWN_PLACES


def test_rendering_leaves_the_providers_own_address_as_it_is() -> None:
    assert rendered(PROVIDER_BASE_URLS["openai"]) == OWN_PLACES


def test_an_https_base_url_changes_the_name_and_keeps_tls() -> None:
    assert rendered("https://llm.example:8443/api/v1") == OWN_PLACES | {
        f"{HOST}/hostname": "llm.example",
        f"{HOST}/address/socket_address/address": "llm.example",
        f"{HOST}/address/socket_address/port_value": 8443,
    }


def test_a_trusted_ca_of_its_own_takes_the_place_of_the_systems() -> None:
    context = f"{OPENAI}/transport_socket/typed_config/common_tls_context/validation_context"
    assert rendered("https://api.openai.com/v1", Path("/ca.pem")) == OWN_PLACES | {
        f"{context}/trusted_ca/filename": "/ca.pem"
    }


def test_an_http_base_url_takes_tls_away_and_with_it_alpn() -> None:
    protocols = f"{OPENAI}/typed_extension_protocol_options/{HTTP_OPTIONS}"
    assert rendered("http://10.0.0.1/v1") == OWN_PLACES | {
        f"{HOST}/hostname": "10.0.0.1",
        f"{HOST}/address/socket_address/address": "10.0.0.1",
        f"{HOST}/address/socket_address/port_value": 80,
        f"{OPENAI}/transport_socket": None,
        f"{protocols}/auto_config": None,
        f"{protocols}/explicit_http_config": {"http_protocol_options": {}},
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
        ("cluster: openai\n", "cluster: nowhere\n", "unknown cluster 'nowhere'"),
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
    assert envoy_config.TEMPLATE.name == "envoy.yaml"
