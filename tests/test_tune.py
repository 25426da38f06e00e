import pytest
from triton.runtime.errors import OutOfResources

from lumina_kernels.triton import _tune


@pytest.fixture
def search(monkeypatch):
    """Search is on, and a launch with n stages takes n milliseconds but 1 does not fit, and 0 does
    not compile."""
    launched = []

    def do_bench(launch, return_mode):
        launch()
        stages = launched[-1]["num_stages"]
        if stages == 1:
            raise OutOfResources(200, 100, "shared memory")
        if stages == 0:
            raise RuntimeError("PassManager::run failed")
        return stages

    monkeypatch.setattr(_tune, "AUTOTUNE", True)
    monkeypatch.setattr(_tune, "_found", {})
    monkeypatch.setattr(_tune, "do_bench", do_bench)
    return launched


CONFIG, CHANGES = {"num_stages": 3, "K": 72}, ({"num_stages": 1}, {"num_stages": 2})


def test_the_table_is_taken_unless_search_is_on(monkeypatch):
    monkeypatch.setattr(_tune, "AUTOTUNE", False)
    assert _tune.fastest(("fwd",), CONFIG, CHANGES, pytest.fail) is CONFIG


def test_the_fastest_that_fits_is_taken_and_remembered(search):
    assert _tune.fastest(("fwd",), CONFIG, CHANGES, search.append) == {"num_stages": 2, "K": 72}
    assert len(search) == 3
    assert _tune.fastest(("fwd",), CONFIG, CHANGES, search.append)["num_stages"] == 2
    assert len(search) == 3
    _tune.fastest(("bwd",), CONFIG, CHANGES, search.append)
    assert len(search) == 6


def test_candidates_that_do_not_compile_are_left_out(search):
    changes = ({"num_stages": 0}, *CHANGES)
    assert _tune.fastest(("fwd",), CONFIG, changes, search.append)["num_stages"] == 2
    assert [config["num_stages"] for config in search] == [3, 0, 1, 2]


def test_where_all_fail_the_table_is_left_and_its_launch_says_why(search):
    config = CONFIG | {"num_stages": 1}
    assert _tune.fastest(("fwd",), config, ({"num_stages": 0},), search.append) == config


def test_sizes_of_one_power_of_two_share_what_was_found():
    assert _tune.magnitude(4096) == _tune.magnitude(5000) == _tune.magnitude(8191)
    assert _tune.magnitude(4095) != _tune.magnitude(4096) != _tune.magnitude(8192)
