"""What docker/ promises: nothing is reachable from outside, no secret is written down, every image has a version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
SERVICES = {
    f"{path.name}:{name}": service
    for path in COMPOSE
    for name, service in YAML(typ="safe").load(path)["services"].items()
}
FULL = {name: service for name, service in SERVICES.items() if name.startswith("compose.yaml:")}
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|TOKEN|_KEY$|://[^/@]*:[^/@]*@")
FROM_ENV = re.compile(r"\$\{(\w+):\?[^}]+\}")
PINNED = re.compile(r"(?!.*:latest)[\w./-]+:[\w.-]*\d[\w.-]*")


def environment(service: dict[str, Any]) -> dict[str, str | None]:
    return service.get("environment") or {}


def test_the_stack_is_complete() -> None:
    assert {name.partition(":")[2] for name in FULL} == {"postgres", "minio", "bucket", "prefect", "mlflow", "worker"}


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_ports_are_published_on_this_machine_only(service: dict[str, Any]) -> None:
    assert "network_mode" not in service
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port)


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_secrets_come_from_the_environment(service: dict[str, Any]) -> None:
    for name, value in environment(service).items():
        if value is not None and (SECRET.search(name) or SECRET.search(value)):
            assert FROM_ENV.search(value), f"{name} is written down, or has a default"
    assert not [word for word in service.get("command", []) if SECRET.search(word)]


@pytest.mark.parametrize("service", FULL.values(), ids=FULL)
def test_images_have_versions_and_services_restart(service: dict[str, Any]) -> None:
    assert PINNED.fullmatch(service["image"])
    assert service["restart"] in {"unless-stopped", "on-failure"}
    assert "healthcheck" in service or service["restart"] == "on-failure"


def test_the_dockerfile_starts_from_a_version() -> None:
    bases = re.findall(r"(?m)^FROM (\S+) AS (\w[\w-]*)$", (DOCKER / "Dockerfile").read_text())
    stages = {stage for _, stage in bases}
    assert {"server", "worker"} <= stages
    assert all(base in stages or PINNED.fullmatch(base) for base, _ in bases)


def test_the_example_names_every_secret_and_holds_none() -> None:
    example = (DOCKER / ".env.example").read_text()
    wanted = {name for path in COMPOSE for name in FROM_ENV.findall(path.read_text())}
    assert set(re.findall(r"(?m)^(\w+)=$", example)) == wanted
    assert not re.search(r"(?m)^#?\w+=.+$", example)


def test_optional_settings_are_named_in_the_example() -> None:
    named = set(re.findall(r"(?m)^#(\w+)=$", (DOCKER / ".env.example").read_text()))
    assert {name for path in COMPOSE for name in re.findall(r"\$\{(\w+):-", path.read_text())} <= named


def test_the_folder_mlflow_is_not_a_package() -> None:
    assert not (DOCKER.parent / "mlflow" / "__init__.py").exists(), "it would shadow the installed mlflow"
