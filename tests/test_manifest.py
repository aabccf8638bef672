"""The manifest without a cloud: Cloud Run's rules for it, and how it is read and run here."""

from __future__ import annotations

import copy
import json
import re
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from extproc.local import container, manifest
from extproc.local.container import CHECKOUT, MANIFEST, Process, build
from extproc.local.http import Request, Response, serve
from extproc.local.instance import Instance, InstanceFailed, succeeds
from extproc.local.manifest import Probe
from extproc.local.up_manifest import POLICY_SECRET
from extproc.local.valkey import free_port
from extproc.settings import Settings
from tests.rig import eventually

SCHEMA = json.loads((Path(__file__).parent / "cloudrun.schema.json").read_text())
TEXT = MANIFEST.read_text()
SERVICE: dict[str, Any] = yaml.safe_load(TEXT)
SPEC: dict[str, Any] = SERVICE["spec"]["template"]["spec"]
ANNOTATIONS: dict[str, str] = SERVICE["spec"]["template"]["metadata"]["annotations"]
CONTAINERS: dict[str, dict[str, Any]] = {one["name"]: one for one in SPEC["containers"]}
ENV = {name: {one["name"]: one["value"] for one in of["env"]} for name, of in CONTAINERS.items()}
MIB = {"Mi": 1, "Gi": 1024}
GRACE_S = 10  # between Cloud Run's SIGTERM and its SIGKILL


def mib(text: str) -> int:
    return int(text[:-2]) * MIB[text[-2:]]


# What Cloud Run documents ---------------------------------------------------------------------------------------------


def test_it_is_a_service_as_cloud_run_documents_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(SERVICE)
    assert [f"{error.json_path}: {error.message}" for error in found] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "timeoutSeconds"), 3601),
        (("spec", "template", "spec", "containerConcurrency"), 1001),
        (("spec", "template", "spec", "securityContext"), {}),
        (("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
        (("spec", "template", "spec", "containers", 0, "ports", 0, "name"), "http"),
        (("spec", "template", "spec", "containers", 0, "startupProbe", "exec"), {"command": ["true"]}),
        (("spec", "template", "spec", "containers", 1, "livenessProbe"), {"tcpSocket": {"port": 1}}),
        (("spec", "template", "spec", "containers", 1, "resources", "limits", "cpu"), "1.5"),
        (("spec", "template", "spec", "containers", 1, "env", 0, "value"), 1),
        (("spec", "template", "spec", "volumes", 0, "emptyDir", "medium"), "Disk"),
        (("spec", "template", "metadata", "annotations", "run.googleapis.com/cpu-throttling"), False),
        (("spec", "template", "metadata", "annotations", "run.googleapis.com/cpu-throtling"), "false"),
        (("metadata", "annotations", "run.googleapis.com/startup-cpu-boost"), "true"),
    ],
    ids=str,
)
def test_the_schema_refuses(path: tuple[Any, ...], value: Any) -> None:
    changed: Any = copy.deepcopy(SERVICE)
    place = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)


def test_one_container_takes_the_calls_and_all_are_named_once() -> None:
    assert [name for name, one in CONTAINERS.items() if "ports" in one] == ["envoy"]
    assert len(CONTAINERS) == len(SPEC["containers"])


def test_cpu_and_memory_go_together() -> None:
    """The table of Cloud Run's documentation; the second generation wants 512 MiB, less than a CPU no concurrency."""
    most = {1: 4, 2: 8, 4: 16, 6: 24, 8: 32}
    limits = [one["resources"]["limits"] for one in CONTAINERS.values()]
    cpus, memory_mib = sum(int(one["cpu"]) for one in limits), sum(mib(one["memory"]) for one in limits)
    assert 512 <= memory_mib <= most[cpus] * 1024
    for one in limits:
        assert mib(one["memory"]) <= most[int(one["cpu"])] * 1024


def test_always_on_and_never_without_an_instance() -> None:
    assert ANNOTATIONS["run.googleapis.com/cpu-throttling"] == "false"
    assert ANNOTATIONS["run.googleapis.com/startup-cpu-boost"] == "true"
    least, most = (int(ANNOTATIONS[f"autoscaling.knative.dev/{name}Scale"]) for name in ("min", "max"))
    assert 1 <= least <= most
    assert SPEC["timeoutSeconds"] == 3600


def test_the_order_of_the_start_names_containers_with_startup_probes() -> None:
    """Without a probe, Cloud Run takes a container for ready as soon as it runs."""
    after = json.loads(ANNOTATIONS["run.googleapis.com/container-dependencies"])
    assert after == {"envoy": ["extproc"]}
    for name in {name for names in after.values() for name in names}:
        assert "startupProbe" in CONTAINERS[name]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("kind", ["startupProbe", "livenessProbe"])
def test_probes_ask_where_somebody_listens_and_end_in_time(name: str, kind: str) -> None:
    probe = CONTAINERS[name].get(kind)
    if probe is None:
        return
    assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    if kind == "startupProbe":
        assert probe["failureThreshold"] * probe["periodSeconds"] <= 240
    action = next(probe[kind] for kind in ("httpGet", "grpc") if kind in probe)
    if name == "envoy":
        assert action["port"] == CONTAINERS["envoy"]["ports"][0]["containerPort"]
    else:
        assert str(action["port"]) == ENV["extproc"]["TOLLGATE_HEALTH_PORT"]
        assert ENV["extproc"]["TOLLGATE_HEALTH_HOST"] == "0.0.0.0", "a probe comes from outside of the container"


def test_every_mount_has_its_volume_and_both_containers_share_one_at_one_path() -> None:
    volumes = {one["name"]: one for one in SPEC["volumes"]}
    mounts = {name: {one["name"]: one["mountPath"] for one in of["volumeMounts"]} for name, of in CONTAINERS.items()}
    assert {name for of in mounts.values() for name in of} == set(volumes)
    assert mounts["envoy"]["shared"] == mounts["extproc"]["shared"]
    assert volumes["shared"]["emptyDir"]["medium"] == "Memory"


def test_memory_holds_the_volume_and_the_volume_the_journal() -> None:
    size_mib = next(mib(one["emptyDir"]["sizeLimit"]) for one in SPEC["volumes"] if "emptyDir" in one)
    assert int(ENV["extproc"]["TOLLGATE_JOURNAL_MAX_MIB"]) * 1.5 <= size_mib
    assert size_mib <= mib(CONTAINERS["extproc"]["resources"]["limits"]["memory"]) / 4


# What the containers need of each other -------------------------------------------------------------------------------


def test_the_processor_takes_its_settings() -> None:
    filled = manifest.read(MANIFEST, {"PROJECT_ID": "my-project", "REDIS_URL": "redis://10.0.0.3:6379/0"})
    env = next(one.env for one in filled.containers if one.name == "extproc")
    settings = Settings.from_environment(env)
    known = (CHECKOUT / "docs" / "settings.md").read_text() + "`TMPDIR`"
    assert [name for name in env if f"`{name}`" not in known and not name.endswith("_SECRET")] == []
    assert settings.ship
    assert settings.usage_store == "bigquery://my-project/tollgate"
    assert settings.envoy_config_path == Path(ENV["envoy"]["TOLLGATE_ENVOY_CONFIG"])
    assert set(settings.secret_versions) == {"openai", "anthropic", "gemini"}
    (policy,) = (one for one in SPEC["volumes"] if one["name"] == "policy")
    mount = next(one["mountPath"] for one in CONTAINERS["extproc"]["volumeMounts"] if one["name"] == "policy")
    assert str(settings.policy_path) == f"{mount}/{policy['secret']['items'][0]['path']}"


def test_everything_is_written_below_the_volume() -> None:
    below = ("TOLLGATE_ENVOY_CONFIG", "TOLLGATE_SOCKET", "TOLLGATE_STATE_DIR", "TMPDIR")
    mount = next(one["mountPath"] for one in CONTAINERS["extproc"]["volumeMounts"] if one["name"] == "shared")
    assert all(Path(ENV["extproc"][name]).is_relative_to(mount) for name in below)


def test_everything_ends_within_the_grace() -> None:
    drain_s, flush_s = (int(ENV["extproc"][f"TOLLGATE_{name}_TIMEOUT_S"]) for name in ("DRAIN", "FLUSH"))
    assert drain_s + flush_s < GRACE_S
    assert drain_s < int(ENV["envoy"]["ENVOY_DRAIN_S"]) < GRACE_S, "Envoy passes on what the processor says last"


def test_threads_and_workers_are_as_many_as_cpus() -> None:
    assert ENV["envoy"]["ENVOY_CONCURRENCY"] == CONTAINERS["envoy"]["resources"]["limits"]["cpu"]
    assert ENV["extproc"]["TOLLGATE_WORKERS"] == CONTAINERS["extproc"]["resources"]["limits"]["cpu"]


def test_what_is_to_be_filled_in_is_said() -> None:
    said = TEXT.partition("apiVersion")[0]
    assert set(re.findall(r"\$\{(\w+)\}", TEXT)) == set(re.findall(r"\$\{(\w+)\}", said))


# How it is run here ---------------------------------------------------------------------------------------------------


@pytest.fixture
def built(short_directory: Path, tmp_path: Path) -> dict[str, Process]:
    policy = tmp_path / "policy.yaml"
    policy.write_text("models: {}\n")
    read = manifest.read(MANIFEST, {"PROJECT_ID": "p"})
    directory = short_directory / tmp_path.name[-3:]
    processes = build(read, directory, 18_123, {POLICY_SECRET: policy}, {"REDIS_URL": "redis://here:1", "X": "1"})
    return {one.name: one for one in processes}


def test_an_environment_is_the_images_and_the_manifests_and_nobody_elses(
    built: dict[str, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud_runs = {"K_SERVICE", "K_REVISION", "K_CONFIGURATION"}
    images = {"extproc": {"PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}}
    images["envoy"] = {"PATH", "PORT", "ENVOY_ADMIN_PORT", "ENVOY_CONCURRENCY", "ENVOY_DRAIN_S"}
    for name, process in built.items():
        changes = {"X"} if name == "extproc" else set()
        assert set(process.env) == set(ENV[name]) | images[name] | cloud_runs | changes
    assert built["envoy"].env["PORT"] == "18123"
    assert built["extproc"].env["REDIS_URL"] == "redis://here:1"


def test_paths_are_those_of_the_volumes_and_the_images(built: dict[str, Process]) -> None:
    processor, envoy = built["extproc"], built["envoy"]
    assert processor.env["TOLLGATE_SOCKET"].endswith("/v/shared/extproc.sock")
    assert processor.env["TOLLGATE_ENVOY_CONFIG"] == envoy.env["TOLLGATE_ENVOY_CONFIG"]
    assert Path(processor.env["TOLLGATE_POLICY"]).read_text() == "models: {}\n"
    assert envoy.command[0] == "/bin/sh"
    assert Path(envoy.command[1]).samefile(CHECKOUT / "envoy" / "entrypoint.sh")
    assert (processor.directory / "envoy" / "envoy.yaml").samefile(CHECKOUT / "envoy" / "envoy.yaml")
    assert processor.env["PATH"].startswith(f"{processor.directory}/.venv/bin:")
    assert (processor.directory / ".venv").samefile(sys.prefix)


def test_probes_ask_at_the_local_ports(built: dict[str, Process]) -> None:
    processor, envoy = built["extproc"], built["envoy"]
    assert processor.startup is not None
    assert processor.liveness is not None
    assert envoy.startup is not None
    assert (envoy.startup.port, envoy.startup.what) == (18_123, "/healthz")
    assert str(processor.startup.port) == processor.env["TOLLGATE_HEALTH_PORT"] != "9091"
    assert (processor.liveness.port, processor.liveness.what) == (processor.startup.port, "live")


def test_a_path_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too deep for a Unix socket"):
        build(manifest.read(MANIFEST, {}), tmp_path / ("x" * 90), 1, {POLICY_SECRET: tmp_path}, {})


def test_a_command_of_the_manifests_takes_the_place_of_the_images(short_directory: Path, tmp_path: Path) -> None:
    read = manifest.read(MANIFEST, {})
    (envoy, processor) = read.containers
    changed = replace(read, containers=(envoy, replace(processor, command=("tollgate", "check"))))
    built = build(changed, short_directory / "command", 1, {POLICY_SECRET: tmp_path}, {})
    assert next(one.command for one in built if one.name == "extproc") == ("tollgate", "check")
    changed = replace(read, containers=(envoy, replace(processor, arguments=("budgets", "--json"))))
    built = build(changed, short_directory / "arguments", 1, {POLICY_SECRET: tmp_path}, {})
    assert next(one.command for one in built if one.name == "extproc") == ("tollgate", "budgets", "--json")


# Order, probes and the end --------------------------------------------------------------------------------------------


def shell(name: str, script: str, **changes: Any) -> Process:
    base = Process(name, ("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, Path("/"), None, None, ())
    return replace(base, **changes)


def probe(port: int, **changes: Any) -> Probe:
    return replace(Probe("tcpSocket", port, "", 0, 1, 1, 3), **changes)


async def run(tmp_path: Path, *processes: Process) -> Instance:
    instance = Instance(processes, lambda name: tmp_path / f"{name}.log")
    try:
        await instance.start()
    except InstanceFailed:
        await instance.stop()
        raise
    return instance


async def test_containers_start_when_those_before_them_are_ready(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        first = shell("first", "sleep 60", startup=probe(listening.getsockname()[1]))
        instance = await run(tmp_path, shell("second", "sleep 60", after=("first",)), first)
    assert instance.started_s["first"] < instance.ready_s["first"] <= instance.started_s["second"]
    await instance.stop()
    assert all(child.returncode is not None for child in instance.children.values())


async def test_a_startup_probe_that_fails_too_often_ends_it(tmp_path: Path) -> None:
    with pytest.raises(InstanceFailed, match="one: its startup probe failed 1 times"):
        await run(tmp_path, shell("one", "sleep 60", startup=probe(free_port(), failures=1)))


async def test_a_container_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    instance = await run(tmp_path, shell("one", "echo no policy; exit 3"))
    with pytest.raises(InstanceFailed, match="the container one ended with code 3: no policy"):
        await instance.supervise()
    await instance.stop()


async def test_a_liveness_probe_that_fails_too_often_ends_it(tmp_path: Path) -> None:
    dead = probe(free_port(), failures=1)
    instance = await run(tmp_path, shell("one", "sleep 60", liveness=dead))
    with pytest.raises(InstanceFailed, match="one: its liveness probe failed 1 times"):
        await instance.supervise()
    await instance.stop()


async def test_the_end_takes_what_a_container_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to its first process; SIGKILL, when that does not help, to all of them."""
    monkeypatch.setattr("extproc.local.instance.GRACE_S", 0.2)
    script = f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/pid; wait; sleep 300"
    instance = await run(tmp_path, shell("one", script), shell("two", "exec sleep 300"))
    await eventually(lambda: text(tmp_path / "pid").endswith("\n"), "its own child to run")
    codes = await instance.stop()
    assert codes == {"one": -9, "two": -15}
    status = Path("/proc") / text(tmp_path / "pid").strip() / "status"
    await eventually(lambda: "\nState:\tZ" in text(status) or not text(status), "that child to be gone")


def text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


@pytest.mark.parametrize(("status", "good"), [(200, True), (399, True), (400, False), (503, False)])
async def test_an_http_probe(status: int, good: bool) -> None:
    async def handle(request: Request) -> Response:
        return Response(status if request.target == "/healthz" else 404)

    server = await serve(handle)
    assert await succeeds(probe(server.port, kind="httpGet", what="/healthz")) is good
    await server.close()


@pytest.mark.parametrize("kind", ["httpGet", "tcpSocket", "grpc"])
async def test_nobody_there_is_a_failure(kind: str) -> None:
    assert not await succeeds(probe(free_port(), kind=kind))


def test_ports_that_are_nobodys_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = container.local_ports(manifest.read(MANIFEST, {}), 18_000)
    assert ports[8080] == 18_000
    assert len(set(ports.values())) == len(ports) == 3
