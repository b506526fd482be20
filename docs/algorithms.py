"""Writes docs/algorithms.md from the tables of rlsys/algo, the presets and the settings of other systems.

python -m docs.algorithms
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.settings import SETTINGS
from rlsys.algo.catalogue import TABLES, linked, markdown_table, names_in, prose, section_of
from rlsys.config.presets import PRESETS

PATH = Path(__file__).with_suffix(".md")

PAPERS: Mapping[str, str] = {
    "grpo": "GRPO, Shao et al. 2024, arXiv:2402.03300",
    "dr_grpo": "Dr. GRPO, Liu et al. 2025, arXiv:2503.20783",
    "dapo": "DAPO, Yu et al. 2025, arXiv:2503.14476",
    "rloo": "RLOO, Ahmadian et al. 2024, arXiv:2402.14740",
    "reinforce_pp": "REINFORCE++, Hu et al. 2025, arXiv:2501.03262",
    "reinforce_pp_baseline": "REINFORCE++ with a group baseline, Hu et al. 2025, arXiv:2501.03262",
    "remax": "ReMax, Li et al. 2023, arXiv:2310.10505",
    "ppo": "PPO, Schulman et al. 2017, arXiv:1707.06347",
    "vapo": "VAPO, Yue et al. 2025, arXiv:2504.05118",
    "gspo": "GSPO, Zheng et al. 2025, arXiv:2507.18071",
    "gmpo": "GMPO, Zhao et al. 2025, arXiv:2507.20673",
    "cispo": "CISPO of MiniMax-M1, 2025, arXiv:2506.13585",
    "topr": "TOPR, Le Roux et al. 2025, arXiv:2503.14286",
    "sapo": "SAPO, Gao et al. 2025, arXiv:2511.20347",
    "areal": "decoupled PPO of AReaL, Fu et al. 2025, arXiv:2505.24298",
    "llamarl": "AIPO of LlamaRL, Wu et al. 2025, arXiv:2505.24034",
    "icepop": "IcePop of Ring-1T, 2025, arXiv:2510.18855",
    "c3po": "C3PO of Ring-lite, 2025, arXiv:2506.14731",
    "m2po": "M2PO, Zheng et al. 2025, arXiv:2510.01161",
    "opo": "OPO, Hao et al. 2025, arXiv:2505.23585",
    "lite_ppo": "Lite PPO, Liu et al. 2025, arXiv:2508.08221",
    "gpg": "GPG, Chu et al. 2025, arXiv:2504.02546",
}

HEAD = """# Algorithms

<!-- Written by `python -m docs.algorithms` from the docstrings of rlsys/algo. Change those, not this file. -->

The objective is one sum over the tokens of a step, divided once by one count:

    sum over tokens of  c (w loss + kl_coef kl + teacher_coef D - entropy_coef H)  /  count

| part | what it is | key |
| --- | --- | --- |
| w | correction: a weight for what another policy sampled, from k = proximal / behaviour | `algo.correction` |
| loss | policy loss, from r = policy / anchor and the advantage A | `algo.loss`, `algo.anchor`, `algo.advantage` |
| c, count | aggregation: what a token counts, over all microbatches and ranks | `algo.aggregation` |
| kl, D, H | divergence from a reference, from a teacher, and entropy | `algo.kl`, `teacher.path`, `algo.entropy_coef` |

Three policies are told apart: *behaviour*, the engine when it sampled a token; *proximal*, the learner before the first
step on the batch; *policy*, the learner now. Every part is a row of a table below, named in the configuration with its
parameters beside it: `algo.loss={name: ppo_clip, eps_high: 0.28}`. A row is a plain function of `rlsys.algo` and can be
called alone.

**Where names lie.** The same word means different numbers in different systems. What differs most often: the epsilon
under a standard deviation (1e-4 to 1e-9), a group of one (its reward, or 0: here always 0), whether the dual clip is on
without being asked for (verl), whether a truncated weight is held from below too (OpenRLHF), the default bounds of GSPO
(3e-4 in its paper, 0.2 where PPO's are taken over), whether `epsilon_high` of CISPO is a distance from 1 or the cap
itself (TRL), whether a masked token stays in the count, and which way up the ratio is that a filter's bounds are on
(verl). The tables say which it is.

**What looks how far.** A row that looks at a token or a sequence gives the same result in every packing. One that looks
at the batch takes a pass over all microbatches and ranks first, so that its result is the same too.

Sections: SECTIONS.
"""


def text() -> str:
    """The whole file."""
    names = [*(table.name for table in TABLES), "Presets", *(f"If you know {system}" for system in SETTINGS)]
    links = ", ".join(f"[{name}](#{_anchor_of(name)})" for name in names)
    parts = [HEAD.replace("SECTIONS", links), *map(section_of, TABLES), _presets(), *map(_if_you_know, SETTINGS)]
    return "\n".join(parts)


def _presets() -> str:
    """The presets, and what a key left out of one is."""
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key, value in preset.items() if value != ()))
    rows = [
        (f"**`{name}`**", *(_value(preset.get(key)) for key in keys), linked(PAPERS[name]))
        for name, preset in PRESETS.items()
    ]
    heads = (f"`train.{key}`" if key == "steps_per_batch" else f"`algo.{key}`" for key in keys)
    return f"""## Presets

`algo.preset` sets the keys below; a key given explicitly wins. A question mark: the number follows from the
configuration, and `rlsys check` prints it. What a paper has beyond rows, its learning rate say, is not in a preset.

{markdown_table(("preset", *heads, "paper"), rows)}"""


def _value(value: Any) -> str:
    """A preset's value as it is written in a configuration."""
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return "<br>".join(map(_value, value))
    if not hasattr(value, "params"):
        return f"`{value}`"
    parameters = [f"`{name}={'?' if given is None else given}`" for name, given in value.params.items()]
    return "<br>".join([f"`{value.name}`", *parameters])


def _if_you_know(system: str) -> str:
    settings = markdown_table(
        (f"in {system}", "here", "difference"),
        [
            (prose(setting.theirs), "<br>".join(f"`{word}`" for word in setting.ours), prose(setting.difference))
            for setting in SETTINGS[system]
        ],
    )
    return f"""## If you know {system}

{settings}
Its names for rows of the tables, with its defaults and what differs:

{names_in(system)}"""


def _anchor_of(name: str) -> str:
    """Where a heading of this name is found."""
    headings = {table.name: f"{table.name}: {', '.join(table.keys)}" for table in TABLES}
    kept = (sign for sign in headings.get(name, name).lower() if sign.isalnum() or sign in " _-")
    return "".join(kept).replace(" ", "-")


def main() -> None:
    PATH.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
