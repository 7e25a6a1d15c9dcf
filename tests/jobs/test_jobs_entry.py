import ast
from pathlib import Path

import pytest
import yaml

from ctc_ray.cli import STAGES

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py")


def test_every_stage_has_a_job() -> None:
    assert {name.replace("-", "_") for name in STAGES} <= {path.stem for path in JOBS}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_is_short_and_runs_the_command_of_its_name(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert path.stem.replace("_", "-") in constants


def test_cluster_yaml_is_valid_for_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert config["max_workers"] >= sum(
        group.get("max_workers", 0) for group in config["available_node_types"].values()
    )
    assert config["head_node_type"] in config["available_node_types"]


def test_cluster_yaml_check_refuses_an_unknown_key() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["idle_timeout"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_cluster_yaml_image_carries_the_ray_version_of_the_project() -> None:
    import ray

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    images = [config["docker"]["image"], config["available_node_types"]["gpu_spot"]["docker"]["worker_image"]]
    assert all(f":{ray.__version__}-" in image for image in images)
