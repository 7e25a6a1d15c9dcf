from pathlib import Path

import pytest

from ctc_ray.config import PhantomConfig, RunConfig, load_config
from ctc_ray.errors import ConfigError


def test_load_config_without_file_gives_the_defaults() -> None:
    assert load_config() == RunConfig()


def test_load_config_override_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("segment:\n  precision: bf16\n  nms_threshold: 0.4\n")
    config = load_config(file, ["segment.precision=fp32"])
    assert config.segment.precision == "fp32"
    assert config.segment.nms_threshold == 0.4


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("embed.bach_size=3", "batch_size"),
        ("segmnt.precision=fp32", "segment"),
        ("map.umap_neighbours=9", "umap_neighbors"),
    ],
)
def test_load_config_unknown_key_names_the_nearest_valid_one(override: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        load_config(None, [override])


def test_load_config_wrong_value_names_key_and_value() -> None:
    with pytest.raises(ConfigError, match=r"phantom\.fields = 0 is wrong"):
        load_config(None, ["phantom.fields=0"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "segment: 3\n", "segment: [1, 2]\n", "a: b: c\n"])
def test_load_config_malformed_file_is_a_config_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(file)


def test_load_config_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["segment", "segment=3", "=3", "segment.=3"])
def test_load_config_override_without_section_and_field_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.field=value"):
        load_config(None, [override])


def test_identity_leaves_out_operational_fields_and_keeps_the_others() -> None:
    config = load_config(None, ["segment.num_network_actors=7", "embed.batch_size=11"])
    assert config.segment.identity() == RunConfig().segment.identity()
    assert config.embed.identity() == RunConfig().embed.identity()
    assert load_config(None, ["segment.nms_threshold=0.9"]).segment.identity() != RunConfig().segment.identity()


def test_config_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PhantomConfig().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["demo", "paper", "cluster"])
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(Path(__file__).resolve().parents[1] / "jobs" / "configs" / f"{name}.yaml")
    assert config != RunConfig()


def test_paper_configuration_carries_the_papers_values() -> None:
    config = load_config(Path(__file__).resolve().parents[1] / "jobs" / "configs" / "paper.yaml")
    assert (config.map.pca_dim, config.map.umap_neighbors, config.map.umap_min_dist) == (32, 200, 0.8)
    assert (config.map.hdbscan_min_cluster_size, config.map.hdbscan_min_samples, config.map.hdbscan_epsilon) == (
        15,
        90,
        0.25,
    )
    assert (config.hil.initial, config.hil.per_loop, config.hil.loops, config.hil.mc_splits) == (100, 100, 4, 100)
    assert (config.phantom.patients, config.phantom.fields) == (90, 175)


def test_fast_map_fills_what_is_not_given_and_given_settings_win(tmp_path: Path) -> None:
    fast = load_config(None, ["map.profile=fast", "map.umap_neighbors=50"]).map
    assert (fast.umap_neighbors, fast.max_fit_cells, fast.placing_epochs) == (50, 20_000, 30)
    file = tmp_path / "config.yaml"
    file.write_text("map: {profile: fast, max_fit_cells: 7000}\n")
    assert load_config(file).map.max_fit_cells == 7000
    assert load_config(file, ["map.profile=paper"]).map.umap_neighbors == 200
    assert fast.identity() != RunConfig().map.identity()
    same = {name: value for name, value in fast.model_dump().items() if name != "profile"}
    assert type(fast)(**same).identity() == fast.identity()


def test_neutral_settings_enter_an_identity_only_away_from_their_default() -> None:
    assert load_config(None, ["train.undefined=null"]).train.identity() == RunConfig().train.identity()
    paper = load_config(None, ["train.undefined=paper", "train.compare_models=true"]).train
    assert paper.identity() == {**RunConfig().train.identity(), "undefined": "paper"}
    assert load_config(None, ["map.placing_epochs=30"]).map.identity()["placing_epochs"] == 30
    assert load_config(None, ["map.backend=cpu", "map.profile=paper"]).map.identity() == RunConfig().map.identity()
