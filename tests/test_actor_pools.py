import pytest

from ctc_ray.actor_pools import Pool, fitted_pools, sizes_that_fit
from ctc_ray.errors import ResourceError
from ctc_ray.progress import Progress

POOLS = [Pool("a", "s.a", 3), Pool("b", "s.b", 1), Pool("c", "s.c", 4, cpus=2)]


def test_pools_grow_in_turns_to_their_sizes_and_leave_a_processor_free() -> None:
    assert sizes_that_fit(POOLS, 5, 0) == [1, 1, 1]
    assert sizes_that_fit(POOLS, 6, 0) == [2, 1, 1]
    assert sizes_that_fit(POOLS, 8, 0) == [2, 1, 2]
    assert sizes_that_fit(POOLS, 100, 0) == [3, 1, 4]


def test_pools_that_do_not_fit_with_one_actor_each_have_no_sizes() -> None:
    assert sizes_that_fit(POOLS, 4.5, 0) is None
    assert sizes_that_fit([Pool("a", "s.a", 1, gpus=1), Pool("b", "s.b", 1, gpus=0.5)], 9, 1) is None


def test_fractions_of_a_gpu_are_shared() -> None:
    pools = [Pool("a", "s.a", 1, gpus=0.5), Pool("b", "s.b", 8, gpus=0.25)]
    assert sizes_that_fit(pools, 9, 1) == [1, 2]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_pools_may_shrink_and_are_refused_only_where_one_actor_each_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network, other = fitted_pools("some stage", [Pool("actor", "s.a", 9), Pool("other", "s.b", 1)], Progress())
    assert (network.min_size, network.max_size, network.initial_size) == (1, 2, 2)
    assert (other.min_size, other.max_size) == (1, 1)
    assert "2 of 9 actors fit" in capsys.readouterr().err
    with pytest.raises(ResourceError, match="at least 6 logical CPUs"):
        fitted_pools("some stage", [Pool("actor", "s.a", 1, cpus=5)], Progress(quiet=True))
