"""docker/ and the Kubernetes manifests, without an engine or a cluster: what they say, and what linters say of them."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.launch_files import MANIFESTS, SCRIPTS, name_of, settings_of

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
# The instructions, each on one line, and those of each stage.
INSTRUCTIONS = re.sub(r"\\\n\s*", "", re.sub(r"^(#.*)?\n", "", DOCKERFILE, flags=re.MULTILINE))
STAGES = {
    name: (parent, body.splitlines())
    for parent, name, body in re.findall(
        r"^FROM (\S+) AS (\w+)\n(.*?)(?=^FROM|\Z)", INSTRUCTIONS, re.MULTILINE | re.DOTALL
    )
}


def linter(name):
    """The command of that name, of this environment or of the system."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return path or pytest.skip(f"no {name}: pip install 'syncbn[dev]'")


def lint(name, *arguments):
    result = subprocess.run([linter(name), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout + result.stderr


def lines_of(target, instruction):
    """What that instruction says in a target and the stages that it is made from, the last word last."""
    parent, body = STAGES[target]
    inherited = lines_of(parent, instruction) if parent in STAGES else []
    return inherited + [line.partition(" ")[2] for line in body if line.split(" ")[0] == instruction]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_checks_syncbn_and_its_user_is_not_root(target):
    assert json.loads(lines_of(target, "CMD")[-1]) == ["syncbn", "check"]
    user = lines_of(target, "USER")[-1]
    assert int(user) > 0, "a number, for Kubernetes' runAsNonRoot cannot read names"
    assert f"--uid {user} " in " ".join(lines_of(target, "RUN"))
    assert STAGES[target][1][-1] == f"USER {user}", "nothing is done as root after it"


def test_no_compiler_is_in_the_image_for_cpus():
    assert "g++" in " ".join(lines_of("wheel", "RUN"))
    assert not re.search(r"\b(g\+\+|gcc|clang|cmake|python3-dev)", " ".join(lines_of("cpu", "RUN")))


def test_versions_are_those_of_the_tests():
    tested = runpy.run_path(str(ROOT / "launch" / "run.py"))["TESTED_TORCH"]
    for target in ("cpu", "cuda"):
        assert lines_of(target, "ARG")[:1] == [f"TORCH={tested}"]
        *_, torch, syncbn = lines_of(target, "RUN")
        assert '"torch==${TORCH}' in torch
        assert syncbn.endswith("--constraint /dist/constraints.txt mpi4py /dist/*.whl")
    assert lines_of("wheel", "COPY")[-1] == "tests/constraints.txt /dist/"


def test_an_image_sets_what_the_launch_scripts_set():
    found = dict(word.split("=") for word in " ".join(STAGES["runtime"][1]).split() if re.match(r"[A-Z_]+=\w+$", word))
    expected = settings_of(SCRIPTS[0])
    del expected["OMP_NUM_THREADS"]
    assert {name: found.get(name) for name in expected} == expected


def test_what_is_copied_exists_and_is_not_ignored():
    everything, *ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    copied = {
        path for _, body in STAGES.values() for line in body if line.startswith("COPY") for path in line.split()[1:-1]
    }
    assert everything == "*"
    assert {line[1:] for line in ignored if line[0] == "!"} == copied
    assert all((ROOT / path).exists() for path in copied)


def test_ssh_agrees_with_the_user_and_the_ports():
    server, client = (DOCKER / "sshd_config").read_text(), (DOCKER / "ssh_config").read_text()
    assert re.search(r"Port (\d+)", server)[1] == re.search(r"Port (\d+)", client)[1]
    assert "HostKey /home/syncbn/.ssh/id_rsa" in server
    assert "keys:/home/syncbn/.ssh" in (DOCKER / "compose.yaml").read_text()
    assert "sshAuthMountPath: /home/syncbn/.ssh" in (ROOT / "launch" / "kubernetes" / "mpijob.yaml").read_text()
    (path,) = re.findall(r"^SetEnv PATH=(\S+)", server, re.MULTILINE)
    assert path.startswith("/opt/venv/bin:")


def test_the_commands_of_the_readme_are_about_files_that_exist():
    readme = (DOCKER / "README.md").read_text()
    assert set(re.findall(r"--target (\w+)", readme)) == {"cpu", "cuda"}
    for name in re.findall(r"\blaunch/[\w./]+\w", readme):
        assert (ROOT / name).exists(), name


def test_hadolint_has_nothing_to_say():
    assert lint("hadolint", DOCKER / "Dockerfile") == (0, "")


def test_compose_reads_the_lab():
    code, output = lint("docker-compose", "-f", DOCKER / "compose.yaml", "config", "--format", "json")
    assert code == 0, output
    services = json.loads(output)["services"]
    assert set(services) == {"node0", "node1"}
    for rank, (name, service) in enumerate(sorted(services.items())):
        assert service["hostname"] == name, "ssh and MASTER_ADDR use it"
        assert service["environment"]["NODE_RANK"] == str(rank)
        assert service["build"]["target"] == "cpu"
        assert not service.get("privileged")


def pods_of(document):
    """What a manifest says of its pods, as Pods; a TrainJob says little of them, but a container's values."""
    if isinstance(document, list):
        return [pod for part in document for pod in pods_of(part)]
    if not isinstance(document, dict):
        return []
    if "resourcesPerNode" in document:
        resources = {"resources": document["resourcesPerNode"]}
        names = ("image", "command", "env")
        container = {"name": "trainer"} | {name: document[name] for name in names} | resources
        return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": {"containers": [container]}}]
    if "template" in document:
        return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | document["template"]]
    return [pod for part in document.values() for pod in pods_of(part)]


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_kubernetes_knows_every_field(path, tmp_path):
    """Of built-in kinds and of all kinds' pods; Kubeflow's own fields are beyond the validator."""
    validator = linter("kubernetes-validate")
    yaml = pytest.importorskip("yaml", reason="no PyYAML")
    assert lint(validator, "--strict", "--quiet", "--no-warn", path) == (0, "")
    pods = pods_of(list(yaml.safe_load_all(path.read_text())))
    assert pods
    assert all(pod["spec"]["containers"] for pod in pods)
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    assert lint(validator, "--strict", "--quiet", tmp_path / "pods.yaml") == (0, "")
    pods[-1]["spec"]["containers"][0]["volumesMounts"] = []
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    code, output = lint(validator, "--strict", tmp_path / "pods.yaml")
    assert code == 1, "a misspelt field"
    assert "volumesMounts" in output
