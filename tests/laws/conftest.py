"""Learner processes and their tiny model, shared by the laws of the trainer: their imports are paid once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.laws.learner_ranks import Ranks, make_model


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))
