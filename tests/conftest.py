"""Settings of every test."""

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine is slow, not wrong.
settings.register_profile("rlsys", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlsys")


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those with real engines stay in one of them, one after another: each has
    clusters, ports, shared memory and two cores to itself but for the pure tests beside it."""
    for item in items:
        if item.get_closest_marker("engines"):
            item.add_marker(pytest.mark.xdist_group("engines"))
