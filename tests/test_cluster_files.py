"""The files that start a cluster, checked without one: fields, versions, and that the shipped configurations fit the machines."""

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ctc_ray import __version__
from ctc_ray.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "tests" / "kuberay_v1.schema.json").read_text())
MANIFESTS = sorted((ROOT / "kuberay").glob("*.yaml"))
INSTALLED = "/home/ray/ctc_ray/"
"""Where images and the launcher put the repository."""
KNOWN_VARIABLES = re.compile(
    r"AWS_[A-Z_]+|OMP_NUM_THREADS|RAY_(USAGE_STATS_ENABLED|DATA_DISABLE_PROGRESS_BARS|AUTH_MODE)|CTC_RAY_WORKER_LOGS"
)
Document = dict[str, Any]


@dataclass(frozen=True)
class Machines:
    """A group of equal machines."""

    name: str
    most: int
    cpus: int
    gpus: int


def _read(path: Path) -> Document:
    return yaml.safe_load(path.read_text())


def _quantity(text: str) -> float:
    scale = {
        "": 1.0,
        "m": 1e-3,
        "Ki": 2**10,
        "Mi": 2**20,
        "Gi": 2**30,
        "Ti": 2**40,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
    }
    number = re.match(r"[0-9.]+", text)
    return float(number.group()) * scale[text[number.end() :]] if number else 0.0


def needs_of(stage: str, config: RunConfig) -> list[tuple[float, int]]:
    """CPUs and GPUs of every actor or worker that a stage holds at once, and of the task that feeds them."""
    reader = [(1.0, 0)]
    if stage == "segment":
        s = config.segment
        network = [(float(s.num_network_threads), int(s.use_gpu))] * s.num_network_actors
        return network + [(1.0, 0)] * s.num_instance_actors + reader
    if stage == "embed":
        return [(1.0, int(config.embed.use_gpu))] * config.embed.num_actors + reader
    if stage == "pretrain":
        return [(1.0, int(config.pretrain.use_gpu))] * config.pretrain.num_workers + reader
    return reader


def unplaced(needs: list[tuple[float, int]], groups: list[Machines]) -> int:
    """Actors for which no machine has room when every group is at its most: those with GPUs first, then the largest."""
    free = [[group.cpus, group.gpus] for group in groups for _ in range(group.most)]
    free.sort(key=lambda room: room[1])  # machines without GPUs first
    left = 0
    for cpus, gpus in sorted(needs, key=lambda need: (need[1], need[0]), reverse=True):
        room = next((room for room in free if room[0] >= cpus and room[1] >= gpus), None)
        if room is None:
            left += 1
        else:
            room[0] -= cpus
            room[1] -= gpus
    return left


def _pods(spec: Document) -> Iterator[tuple[str, Document]]:
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]["spec"]


def _groups(spec: Document) -> list[Machines]:
    found = []
    for group in spec.get("workerGroupSpecs", []):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(limits.get("nvidia.com/gpu", 0))
        found.append(Machines(group["groupName"], group["maxReplicas"], int(_quantity(limits["cpu"])), gpus))
    return found


def _image_problems(where: str, image: str, ray: str) -> Iterator[str]:
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    wanted = f":{__version__}-ray{ray}-py{python.replace('.', '')}-"
    if wanted not in image:
        yield f"{where}: image {image} does not carry {wanted}"


def _pod_problems(where: str, pod: Document, ray: str) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        yield from _image_problems(where, container["image"], ray)
        limits, requests = (container["resources"].get(kind, {}) for kind in ("limits", "requests"))
        if limits != requests or "memory" not in limits or "cpu" not in limits:
            yield f"{where}: Ray counts limits and Kubernetes places requests: both must be there and equal"
        for variable in container.get("env", []):
            if not KNOWN_VARIABLES.fullmatch(variable["name"]):
                yield f"{where}: nobody reads the variable {variable['name']}"
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        if missing := set(mounts.values()) - set(volumes):
            yield f"{where}: no volume {', '.join(sorted(missing))}"
        shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        # Ray's object store takes 30 % of a machine's memory.
        if shared.get("medium") != "Memory" or _quantity(shared.get("sizeLimit", "0")) < 0.3 * _quantity(
            limits["memory"]
        ):
            yield f"{where}: /dev/shm must be an emptyDir of medium Memory, at least 30 % of the memory"
        gpus = int(limits.get("nvidia.com/gpu", 0))
        if gpus and not any(t.get("key") == "nvidia.com/gpu" for t in pod.get("tolerations", [])):
            yield f"{where}: GPU machines are tainted, and nothing tolerates it"
        if ("-gpu" in container["image"]) != bool(gpus):
            yield f"{where}: a GPU image wants a GPU, and a GPU a GPU image"
    if pod.get("restartPolicy") != "Never":
        yield f"{where}: restartPolicy must be Never: the autoscaler replaces pods"


def _entry_problems(name: str, job: Document, groups: list[Machines]) -> Iterator[str]:
    words = shlex.split(job["entrypoint"])
    if words[:2] != ["python", "-m"] or not words[2].startswith("jobs."):
        yield f"{name}: the entrypoint must be python -m jobs.STAGE"
        return
    stage = words[2].removeprefix("jobs.")
    if not (ROOT / "jobs" / f"{stage}.py").is_file():
        yield f"{name}: there is no jobs/{stage}.py"
    config = None
    if "--config" in words:
        path = words[words.index("--config") + 1]
        if not path.startswith(INSTALLED) or not (ROOT / path.removeprefix(INSTALLED)).is_file():
            yield f"{name}: the image holds no {path}"
            return
        config = ROOT / path.removeprefix(INSTALLED)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    left = unplaced(needs_of(stage, load_config(config, overrides)), groups)
    if left:
        yield f"{name}: {left} actors of {stage} find no room in {[group.name for group in groups]}"
    environment = yaml.safe_load(job.get("runtimeEnvYAML", "{}")) or {}
    if unknown := set(environment) - {
        "env_vars",
        "working_dir",
        "pip",
        "uv",
        "conda",
        "config",
        "py_modules",
        "image_uri",
    }:
        yield f"{name}: runtimeEnvYAML has unknown keys {sorted(unknown)}"
    for variable, value in (environment.get("env_vars") or {}).items():
        if not KNOWN_VARIABLES.fullmatch(variable) or not isinstance(value, str):
            yield f"{name}: {variable} of runtimeEnvYAML is unknown, or not text"


def problems_of(document: Document) -> list[str]:
    """Everything wrong with one Kubernetes object of kuberay/."""
    import ray

    kinds = {kind["properties"]["kind"]["const"]: kind for kind in SCHEMA["oneOf"]}
    if document.get("kind") not in kinds:
        return [f"kind {document.get('kind')} is none of {sorted(kinds)}"]
    schema = kinds[document["kind"]] | {"$defs": SCHEMA["$defs"]}
    if errors := list(jsonschema.Draft202012Validator(schema).iter_errors(document)):
        return [f"{error.json_path}: {error.message}" for error in errors]
    if document["kind"] == "ServiceAccount":
        return []
    spec = document["spec"]
    cluster = spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]
    found = []
    if cluster.get("rayVersion") != ray.__version__:
        found.append(f"rayVersion {cluster.get('rayVersion')} is not {ray.__version__}")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("head: num-cpus must be 0, so that stages run on workers alone")
    for where, pod in _pods(cluster):
        found += _pod_problems(where, pod, cluster.get("rayVersion", ""))
        if pod.get("serviceAccountName") != _read(ROOT / "kuberay" / "serviceaccount.yaml")["metadata"]["name"]:
            found.append(f"{where}: kuberay/serviceaccount.yaml does not make {pod.get('serviceAccountName')}")
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: replicas outside of minReplicas to maxReplicas")
    if document["kind"] == "RayJob":
        found += _entry_problems(document["metadata"]["name"], spec, _groups(cluster))
        if not spec.get("shutdownAfterJobFinishes"):
            found.append("shutdownAfterJobFinishes must be true: machines cost until they are gone")
    return found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_has_known_fields_and_fits_the_project(path: Path) -> None:
    assert problems_of(_read(path)) == []


def _worker(document: Document) -> Document:
    return document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def _container(document: Document) -> Document:
    return _worker(document)["template"]["spec"]["containers"][0]


def _set(target: Document, key: str, value: object) -> None:
    target[key] = value


BREAKAGES: dict[str, tuple[Callable[[Document], object], str]] = {
    "misspelt job field": (lambda d: _set(d["spec"], "shutdownAfterJobFinish", True), "shutdownAfterJobFinish"),
    "misspelt group field": (lambda d: _set(_worker(d), "maxReplica", 3), "maxReplica"),
    "pod field of another level": (lambda d: _set(_worker(d)["template"], "tolerations", []), "tolerations"),
    "unknown submission mode": (lambda d: _set(d["spec"], "submissionMode", "Batch"), "Batch"),
    "number where text is due": (lambda d: _set(_worker(d)["rayStartParams"], "num-cpus", 8), "8"),
    "no entrypoint": (lambda d: d["spec"].pop("entrypoint"), "entrypoint"),
    "old api": (lambda d: _set(d, "apiVersion", "ray.io/v1alpha1"), "ray.io/v1' was expected"),
    "kind that is not there": (lambda d: _set(d, "kind", "RayJobs"), "RayJobs"),
    "other Ray": (lambda d: _set(d["spec"]["rayClusterSpec"], "rayVersion", "2.40.0"), "2.40.0"),
    "other image": (lambda d: _set(_container(d), "image", "rayproject/ray:2.40.0-py310-gpu"), "2.40.0-py310"),
    "image without GPU": (lambda d: _set(_container(d), "image", _container(d)["image"][:-3] + "cpu"), "GPU image"),
    "no toleration": (lambda d: _set(_worker(d)["template"]["spec"], "tolerations", []), "tolerates"),
    "no shared memory": (lambda d: _set(_container(d), "volumeMounts", []), "/dev/shm"),
    "volume that is not there": (lambda d: _set(_worker(d)["template"]["spec"], "volumes", []), "no volume"),
    "requests below limits": (lambda d: _set(_container(d)["resources"], "requests", {"cpu": "1"}), "equal"),
    "unknown variable": (lambda d: _set(_container(d), "env", [{"name": "AWS_REGOIN2", "value": "x"}]), "nobody reads"),
    "job that is not there": (lambda d: _set(d["spec"], "entrypoint", "python -m jobs.embedd c"), "no jobs/embedd.py"),
    "configuration that is not there": (
        lambda d: _set(d["spec"], "entrypoint", f"python -m jobs.embed c --config {INSTALLED}x.yaml"),
        "holds no",
    ),
    "more actors than GPUs": (lambda d: _set(_worker(d), "maxReplicas", 3), "find no room"),
    "actors that no machine can hold": (
        lambda d: _set(d["spec"], "entrypoint", "python -m jobs.segment c --set segment.num_network_threads=64"),
        "find no room",
    ),
    "variable that is a number": (
        lambda d: _set(d["spec"], "runtimeEnvYAML", "env_vars: {OMP_NUM_THREADS: 1}"),
        "text",
    ),
    "cluster that stays": (lambda d: d["spec"].pop("shutdownAfterJobFinishes"), "shutdownAfterJobFinishes"),
    "unknown service account": (
        lambda d: _set(_worker(d)["template"]["spec"], "serviceAccountName", "other"),
        "does not make other",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_manifest_is_refused_and_the_fault_named(name: str) -> None:
    breaking, expected = BREAKAGES[name]
    document = copy.deepcopy(_read(ROOT / "kuberay" / "rayjob-embed.yaml"))
    breaking(document)
    problems = problems_of(document)
    assert any(expected in problem for problem in problems), problems


def _launcher_groups() -> list[Machines]:
    config = _read(ROOT / "cluster.yaml")
    return [
        Machines(name, kind["max_workers"], kind["resources"]["CPU"], kind["resources"].get("GPU", 0))
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]


@pytest.mark.parametrize("stage", ["segment", "embed", "pretrain"])
@pytest.mark.parametrize("name", ["cluster", "cluster_gpu"])
def test_shipped_configurations_fit_both_clusters(name: str, stage: str) -> None:
    needs = needs_of(stage, load_config(ROOT / "jobs" / "configs" / f"{name}.yaml"))
    kuberay = _groups(_read(ROOT / "kuberay" / "raycluster.yaml")["spec"])
    assert any(gpus for _, gpus in needs) == (name == "cluster_gpu")
    assert unplaced(needs, _launcher_groups()) == 0
    assert unplaced(needs, kuberay) == 0
    assert unplaced(needs, [Machines("small", 1, 4, 0)]) > 0


def test_launcher_runs_stages_on_spot_workers_with_the_storage_identity() -> None:
    config = _read(ROOT / "cluster.yaml")
    for name, kind in config["available_node_types"].items():
        assert "IamInstanceProfile" in kind["node_config"], f"Ray gives the head alone a profile by itself: {name}"
        spot = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (name != config["head_node_type"])
    assert config["max_workers"] == sum(group.most for group in _launcher_groups())


def test_launcher_node_settings_are_those_of_the_cloud_service() -> None:
    botocore = pytest.importorskip("botocore.session", reason="boto3 knows what EC2 accepts")
    validate = pytest.importorskip("botocore.validate")
    shape = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in _read(ROOT / "cluster.yaml")["available_node_types"].values():
        for extra, faults in (({}, 0), ({"InstanceTyp": "x"}, 1)):
            request = kind["node_config"] | {"MinCount": 1, "MaxCount": 1} | extra
            report = validate.ParamValidator().validate(request, shape)
            assert len(report._errors) == faults, report.generate_report()


def test_one_ray_and_one_python_stand_in_all_files() -> None:
    import ray

    texts = {path.name: path.read_text() for path in [ROOT / "cluster.yaml", *(ROOT / "kuberay").iterdir()]}
    versions = {
        (name, found)
        for name, text in texts.items()
        for found in re.findall(r"(?:rayproject/ray:|-ray|\]==|rayVersion: \")([0-9]+\.[0-9]+\.[0-9]+)", text)
    }
    assert {found for _, found in versions} == {ray.__version__}
    assert {name for name, _ in versions} == {"cluster.yaml", "raycluster.yaml", "rayjob-embed.yaml", "Dockerfile"}
    pythons = {found for text in texts.values() for found in re.findall(r"-py(3[0-9]+)", text)}
    assert pythons == {"311"}


def _commands(path: Path) -> list[list[str]]:
    """Words of every `ctc-ray submit` and `ray job submit` of a document, in code blocks and in back quotes."""
    text = path.read_text()
    shown = re.findall(r"`([^`\n]+)`", text) + [
        line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    parts = [part.strip() for line in shown for part in line.partition("#")[0].split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(("ctc-ray submit ", "ray job submit --"))]


def _options_of(words: list[str]) -> set[str]:
    """Options that a `ctc-ray` command line may carry."""
    from typer.main import get_command

    from ctc_ray.cli import app

    command: Any = get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("document", ["README.md", "docs/cluster.md"])
def test_commands_of_the_documents_exist_with_their_options(document: str) -> None:
    from ctc_ray.cli import submittable

    shown = _commands(ROOT / document)
    stages = set()
    for words in shown:
        if words[:2] == ["ctc-ray", "submit"]:
            stages.add(words[2])
            assert words[2] in submittable()
            assert "--address" in words
            given = {word for word in words[3:] if word.startswith("--")} - _options_of(["submit"])
            assert given <= _options_of(words[2:]), words
        elif "--" in words:
            entry = words[words.index("--") + 1 :]
            assert entry[:2] == ["python", "-m"], words
            assert entry[2] == "ctc_ray.cli" or (ROOT / f"{entry[2].replace('.', '/')}.py").is_file(), words
    assert {"segment", "split", "pretrain", "embed", "map", "train", "simulate", "index", "detect", "report"} <= stages


def test_every_stage_is_shown_in_both_forms() -> None:
    from ctc_ray.cli import STAGES

    shown = _commands(ROOT / "docs" / "cluster.md")
    through_us = {words[2] for words in shown if words[:2] == ["ctc-ray", "submit"]}
    plain = {
        word.removeprefix("jobs.").replace("_", "-") for words in shown for word in words if word.startswith("jobs.")
    }
    assert set(STAGES) <= through_us
    assert set(STAGES) <= plain
