"""A worker extension for tests: the worker tells its process id, and then takes a minute to come up."""

import os
import time
from pathlib import Path

from rlsys.weights.vllm_plugin import WorkerExtension
from tests.integration.serving import COMING_UP_VARIABLE

__all__ = ["WorkerExtension"]

file = Path(os.environ[COMING_UP_VARIABLE])
file.with_suffix(".part").write_text(str(os.getpid()), encoding="utf-8")
file.with_suffix(".part").rename(file)
time.sleep(60)
