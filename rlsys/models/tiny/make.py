"""Making the embedded model: a Hugging Face folder for transformers and vLLM. The same seed gives the same bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from rlsys.errors import RlsysError
from rlsys.models.folder import write_folder
from rlsys.models.tiny import model as model_file
from rlsys.models.tiny import warmup as warmup_file
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.models.tiny.warmup import Progress, Recipe, lesson_questions, render_lessons, warm_up
from rlsys.prompts import question, split, tasks

BAND = (1 / 3, 1 / 2)  # accuracy that leaves reinforcement learning something to build on, and something to learn
ATTEMPTS = 3  # random initialisations tried until one ends in the band; the first one nearly always does
RECIPE_SOURCES = (model_file, warmup_file, question, split, tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySummary:
    """What was made.

    Attributes:
        path: the folder.
        num_parameters: the tied head counted once.
        steps: of the warm-up that was kept; 0 without one.
        accuracy: share of greedy answers that are right, on training-side questions not trained on; None without a
            warm-up.
        seconds: wall seconds, everything included.
    """

    path: Path
    num_parameters: int
    steps: int
    accuracy: float | None
    seconds: float


def make_tiny(
    out: Path,
    *,
    seed: int = 0,
    task: str = "reversed_sum",
    recipe: Recipe | None = None,
    warm_up: bool = True,
    progress: Progress | None = None,
) -> TinySummary:
    """Make the model in the folder ``out``; files of the same names are overwritten. Prints nothing, and leaves the
    global state of torch as it was.

    Args:
        task: a task of ``rlsys.prompts.tasks.TASKS`` of at least 2,001 distinct questions.
        recipe: of the warm-up; None means the default one.
        warm_up: False leaves the weights random (fractions of a second).
        progress: called with (step, accuracy) during the warm-up.

    Raises:
        RlsysError: no attempt ended with a third to a half of the answers right.
    """
    started = time.monotonic()
    tokenizer = make_tokenizer()
    with _one_seeded_thread(seed):
        if warm_up:
            model, steps, accuracy = _warmed_up(tokenizer, seed, task, recipe or Recipe(), progress)
        else:
            model, steps, accuracy = make_random_model(tokenizer), 0, None
    model.config.architectures = [type(model).__name__]
    write_folder(out, model, model.config, model.generation_config, tokenizer)
    return TinySummary(
        path=out,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=steps,
        accuracy=accuracy,
        seconds=time.monotonic() - started,
    )


def tiny_model_path(cache_dir: Path | None = None, seed: int = 0, progress: Progress | None = None) -> Path:
    """Folder of the embedded model, made at first use and kept.

    It appears under its name only when complete; of several processes that make it at once one wins, and the same bytes
    would have come of any.

    Args:
        cache_dir: None means ``$XDG_CACHE_HOME/rlsys``, or ``~/.cache/rlsys``.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlsys"
    folder = cache_dir / f"tiny-{recipe_hash(seed)}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
    try:
        make_tiny(unfinished, seed=seed, progress=progress)
        _rename_unless_there(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def recipe_hash(seed: int) -> str:
    """Changes with the seed and with every source file that the model's bytes depend on."""
    digest = blake2b(str(seed).encode(), digest_size=6)
    for module in RECIPE_SOURCES:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _warmed_up(
    tokenizer: PreTrainedTokenizerFast, seed: int, task: str, recipe: Recipe, progress: Progress | None
) -> tuple[Qwen2ForCausalLM, int, float]:
    lessons, exam = (render_lessons(tokenizer, questions) for questions in lesson_questions(task))
    accuracies: list[float] = []
    for _ in range(ATTEMPTS):
        model = make_random_model(tokenizer)
        steps, accuracy = warm_up(model, lessons, exam, seed=seed, recipe=recipe, progress=progress)
        if BAND[0] <= accuracy <= BAND[1]:
            return model, steps, accuracy
        accuracies.append(accuracy)
    raise RlsysError(
        f"the warm-up of the embedded model (task {task}, seed {seed}) ended with "
        f"{', '.join(f'{accuracy:.2f}' for accuracy in accuracies)} of the answers right, wanted a third to a half: "
        "try another seed"
    )


def _rename_unless_there(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # then it was not lost to another process that made the same
            raise


@contextmanager
def _one_seeded_thread(seed: int) -> Iterator[None]:
    """One thread, so that numbers are added up in one order, and a seeded CPU generator; both given back at the end."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(num_threads)
