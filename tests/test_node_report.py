import dataclasses
from pathlib import Path

import pytest

from ctc_ray.node_report import NodeReport, cohort_problem, compare, look_at_machine, memory_bytes
from ctc_ray.storage import Store

HERE = {"python": "3.11.7", "ctc-ray": "0.1.0", "ray": "2.60.0", "torch": "2.15.0"}
GOOD = NodeReport(
    node="10.0.0.1 (aaaaaa)",
    cpus=8.0,
    versions=HERE,
    memory_bytes=32 * 2**30,
    shared_memory_bytes=16 * 2**30,
    object_store_bytes=9 * 2**30,
)


def _wrong(report: NodeReport) -> list[str]:
    return [finding.what for finding in compare([report], HERE) if not finding.ok]


def test_machines_that_agree_give_one_good_line_each() -> None:
    findings = compare([GOOD, dataclasses.replace(GOOD, node="10.0.0.2 (bbbbbb)")], HERE)
    assert [finding.what for finding in findings] == ["node 10.0.0.1 (aaaaaa)", "node 10.0.0.2 (bbbbbb)"]
    assert all(finding.ok for finding in findings)
    assert "ray 2.60.0" in findings[0].value
    assert "object store 9.0 GiB" in findings[0].value


@pytest.mark.parametrize("name", ["ray", "torch", "ctc-ray", "python"])
def test_a_machine_with_another_version_is_a_mismatch(name: str) -> None:
    other = dataclasses.replace(GOOD, versions=HERE | {name: "9.9.9"})
    assert _wrong(other) == [name]
    finding = compare([other], HERE)[-1]
    assert "9.9.9" in finding.value
    assert "10.0.0.1" in finding.value
    assert finding.remedy


def test_a_missing_library_is_a_mismatch() -> None:
    versions = {name: version for name, version in HERE.items() if name != "torch"}
    assert "missing" in compare([dataclasses.replace(GOOD, versions=versions)], HERE)[-1].value


def test_builds_of_one_release_and_patches_of_one_python_agree() -> None:
    versions = HERE | {"torch": "2.15.0+cu128", "python": "3.11.9"}
    assert _wrong(dataclasses.replace(GOOD, versions=versions)) == []
    assert _wrong(dataclasses.replace(GOOD, versions=HERE | {"python": "3.12.7"})) == ["python"]


def test_one_problem_of_many_machines_is_one_line() -> None:
    versions = HERE | {"torch": "2.14.0"}
    reports = [dataclasses.replace(GOOD, node=f"n{i}", versions=versions) for i in range(7)]
    problems = [finding for finding in compare(reports, HERE) if not finding.ok]
    assert len(problems) == 1
    assert "n0, n1, n2, n3 and 3 more" in problems[0].value


def test_an_object_store_larger_than_shared_memory_is_a_problem() -> None:
    assert _wrong(dataclasses.replace(GOOD, shared_memory_bytes=64 * 2**20)) == ["shared memory"]
    assert _wrong(dataclasses.replace(GOOD, shared_memory_bytes=None)) == []


def test_a_gpu_that_torch_cannot_use_is_a_problem() -> None:
    assert _wrong(dataclasses.replace(GOOD, gpus=2.0, gpu_names=["L4"])) == ["GPU"]
    assert _wrong(dataclasses.replace(GOOD, gpus=1.0, gpu_names=["L4"])) == []


def test_little_memory_counts_only_where_stages_run() -> None:
    small = dataclasses.replace(GOOD, memory_bytes=2 * 2**30)
    assert _wrong(small) == ["memory"]
    assert _wrong(dataclasses.replace(small, cpus=0.0)) == []


def test_a_machine_that_did_not_answer_fails_and_says_why() -> None:
    silent = NodeReport(node="n1", error="No module named 'ctc_ray'")
    findings = compare([silent], HERE)
    assert not any(finding.ok for finding in findings)
    assert "No module named 'ctc_ray'" in findings[-1].value


def test_a_machine_that_does_not_see_the_drivers_files_is_told_from_one_that_does(tmp_path: Path) -> None:
    shared, apart = Store(tmp_path / "shared"), Store(tmp_path / "apart")
    shared.write_bytes("_d/driver", b"x")
    assert cohort_problem(shared, "_d", "node") == ""
    assert shared.exists("_d/node")
    assert "driver" in cohort_problem(apart, "_d", "node")
    assert _wrong(dataclasses.replace(GOOD, cohort_problem="cannot be read")) == ["cohort"]


def test_memory_is_that_of_the_container_where_it_is_limited(tmp_path: Path) -> None:
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text("1048576\n")
    none.write_text("max\n")
    assert memory_bytes([str(limit)]) == 1048576
    assert memory_bytes([str(none), str(tmp_path / "missing")]) > 1048576


def test_looking_at_this_machine_gives_the_fields_of_a_report() -> None:
    found = look_at_machine("n", False, None, "")
    report = dataclasses.replace(GOOD, **found)
    assert report.versions["ray"]
    assert report.memory_bytes > 0
    assert report.gpu_names == []
