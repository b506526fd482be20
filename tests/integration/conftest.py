from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with random weights."""
    from rlsys.models.tiny import make_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny(folder, seed=0, warm_up=False)
    return folder
