"""The model below a checkpoint that holds trained weights alone: what was frozen stands in the model's own folder,
which therefore has to be the same when the checkpoint is gone on from. Imports without torch.

``base.json`` beside the rest of a checkpoint has a fingerprint of every file of that folder that the weights follow
from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import xxhash

from rlsys.errors import CheckpointDamaged, ConfigError

BASE_FILE = "base.json"
_PATTERNS = ("config.json", "*.safetensors", "pytorch_model*.bin")
# Of a larger file only so many pieces are read, evenly spread: enough to tell one training from another.
_PIECES, _PIECE_BYTES = 64, 64 << 10


def base_text(base: Mapping[str, str]) -> str:
    """Contents of ``BASE_FILE``: which model a checkpoint needs, by the ``fingerprints`` of when it was loaded."""
    return json.dumps(dict(base), indent=2) + "\n"


def check_base(folder: Path | str, model_path: Path | str) -> None:
    """Refuse the checkpoint ``folder`` where it needs another model than that in ``model_path``. Raises ConfigError, or
    CheckpointDamaged where it cannot be told."""
    path = Path(folder) / BASE_FILE
    if not path.exists():
        return
    try:
        saved = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}") from error
    found = fingerprints(model_path)
    if other := sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name)):
        raise ConfigError(
            "model.path",
            got=f"{model_path}, where {', '.join(other)} is another than when {folder} was saved",
            wanted="the very model that the run began with: the checkpoint holds what was trained alone",
            remedy="put that model back, or start a new run",
        )


def fingerprints(model_path: Path | str) -> dict[str, str]:
    """Size and checksum of the files that the weights follow from, by name."""
    folder = Path(model_path)
    return {path.name: _fingerprint(path) for pattern in _PATTERNS for path in sorted(folder.glob(pattern))}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    checksum = xxhash.xxh3_64()
    with path.open("rb") as file:
        if size <= _PIECES * _PIECE_BYTES:
            checksum.update(file.read())
        else:
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
                checksum.update(file.read(_PIECE_BYTES))
    return f"{size} bytes, {checksum.hexdigest()}"
