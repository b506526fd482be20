"""The tables as text: markdown, made of the rows' docstrings and facts, so that it says what the code does.

Pure: tables in, text out. The words of docstrings and facts are plain; what markdown would take for its own is escaped.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlsys.algo import (
    ADVANTAGES,
    AGGREGATIONS,
    COEFFICIENTS,
    CORRECTIONS,
    DISTILLATIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    SELECTIONS,
    SHAPINGS,
    VALUE_LOSSES,
)
from rlsys.algo.rows import LEGEND, Row, facts_of, inputs_of

SYSTEMS = ("verl", "TRL", "OpenRLHF", "AReaL", "SkyRL")  # those with a column of their own
NOTHING = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of rows.

    Attributes:
        name: as it is called in the code.
        keys: configuration keys that name its rows.
        about: what its rows do, in a sentence or two.
    """

    name: str
    keys: tuple[str, ...]
    about: str
    rows: Mapping[str, Row]


TABLES = (
    Table(
        name="ADVANTAGES",
        keys=("algo.advantage",),
        about="What a rollout, a turn or a token is worth, from rewards. r is a reward, V a value of the critic.",
        rows=ADVANTAGES,
    ),
    Table(
        name="POLICY_LOSSES",
        keys=("algo.loss",),
        about="The loss of a token. r = policy / anchor, A the advantage; the anchor is the proximal or the behaviour "
        "policy (`algo.anchor`); sg() passes no gradient.",
        rows=POLICY_LOSSES,
    ),
    Table(
        name="CORRECTIONS",
        keys=("algo.correction", "algo.rejections"),
        about="What becomes of a token that another policy sampled: a weight w that its loss is multiplied by, or its "
        "rejection. k = proximal / behaviour. A weighting row keeps the number of tokens that the loss is divided by, "
        "a rejecting one makes it smaller.",
        rows=CORRECTIONS,
    ),
    Table(
        name="AGGREGATIONS",
        keys=("algo.aggregation",),
        about="How the losses of tokens become one number. Counts are always those of the whole step, over all "
        "microbatches and ranks; a sequence without a weighted token is no sequence.",
        rows=AGGREGATIONS,
    ),
    Table(
        name="KL_ESTIMATORS",
        keys=("algo.kl",),
        about="Divergence from the reference policy, d = log(policy / reference) of a sampled token; in the loss or in "
        "the reward (`algo.kl_in`).",
        rows=KL_ESTIMATORS,
    ),
    Table(
        name="COEFFICIENTS",
        keys=("algo.kl_control", "algo.entropy_control"),
        about="How the weight of a term moves from step to step. kept: as the step before left it; measured: what the "
        "term came to, nats.",
        rows=COEFFICIENTS,
    ),
    Table(
        name="VALUE_LOSSES",
        keys=("critic.loss",),
        about="The loss of the critic, V its value and R the return.",
        rows=VALUE_LOSSES,
    ),
    Table(
        name="SHAPINGS",
        keys=("algo.shaping",),
        about="What is made of the rewards of a group before they are compared; several are applied in their order.",
        rows=SHAPINGS,
    ),
    Table(
        name="SELECTIONS",
        keys=("algo.selection",),
        about="Which rollouts of a group are trained. A group that is left empty is replaced by another question.",
        rows=SELECTIONS,
    ),
    Table(
        name="DISTILLATIONS",
        keys=("teacher.top_k",),
        about="Divergence from a teacher on the policy's own rollouts: `teacher.top_k=0` is the first, above 0 the "
        "second.",
        rows=DISTILLATIONS,
    ),
)


def section_of(table: Table) -> str:
    """The table in markdown: what its rows are, and what others call them."""
    named = ", ".join(f"`{key}`" for key in table.keys)
    of_rows = markdown_table(
        ("row and parameters", "formula", "source", "looks at", "needs"),
        [
            (_signature(name, function), formula_of(function), linked(facts_of(function).source), *_demands(function))
            for name, function in table.rows.items()
        ],
    )
    elsewhere = markdown_table(
        ("row", *SYSTEMS, "others"),
        [(f"`{name}`", *_names_elsewhere(facts_of(function).peers)) for name, function in table.rows.items()],
    )
    return f"## {table.name}: {named}\n\n{table.about}\n\n{of_rows}\nNames and defaults elsewhere:\n\n{elsewhere}"


def names_in(system: str, tables: Iterable[Table] = TABLES) -> str:
    """What ``system`` calls our rows, as a table."""
    return markdown_table(
        (f"in {system}", "here"),
        [
            (prose(facts_of(function).peers[system]), f"`{name}` of {table.name}")
            for table in tables
            for name, function in table.rows.items()
            if system in facts_of(function).peers
        ],
    )


def formula_of(function: Row) -> str:
    """The docstring up to its first section, in one line of markdown."""
    text = inspect.getdoc(function) or ""
    return prose(re.split(r"\n\s*\n(?:Args|Returns|Raises):", text)[0])


def prose(text: str) -> str:
    """Plain words as markdown in a cell: in one line, names in code font, nothing else taken for markup."""
    parts = re.split(r"``(.+?)``", " ".join(text.split()))
    return "".join(f"`{_cell(part)}`" if index % 2 else _escaped(part) for index, part in enumerate(parts))


def linked(text: str) -> str:
    """``prose`` with papers of arXiv as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", prose(text))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as they are; an empty one gets a dash."""
    lines = [head, ["---"] * len(head), *([cell or NOTHING for cell in cells] for cells in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _signature(name: str, function: Row) -> str:
    """The name, and a line for each parameter with its default."""
    parameters = [
        parameter for parameter in inspect.signature(function).parameters.values() if parameter.name not in LEGEND
    ]
    return "<br>".join([f"**`{name}`**", *(_parameter(parameter) for parameter in parameters)])


def _parameter(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"`{parameter.name}` (no default)"
    return f"`{parameter.name}={_plain(parameter.default)}`"


def _plain(value: object) -> str:
    """A default as YAML reads it back."""
    if isinstance(value, float) and math.isfinite(value):
        digits, _, exponent = f"{value:g}".partition("e")
        return digits if not exponent else f"{digits}{'' if '.' in digits else '.0'}e{int(exponent)}"
    return {"None": "null", "True": "true", "False": "false", "inf": ".inf", "-inf": "-.inf"}.get(
        str(value), str(value)
    )


def _demands(function: Row) -> tuple[str, str]:
    """How far the row looks, and what it must have or be used with."""
    facts = facts_of(function)
    demands = [need.value for need in facts.needs]
    if facts.aggregations:
        demands.append("aggregation " + " or ".join(f"`{name}`" for name in facts.aggregations))
    if facts.anchor is not None:
        demands.append(f"published at the {facts.anchor} policy")
    if facts.is_ratio_loss and facts.anchor != "behaviour":
        demands.append("at the proximal anchor: more than one step a batch")
    if not facts.keeps_count:
        demands.append("makes the count smaller")
    if not facts.as_loss:
        demands.append("`algo.kl_in=reward`")
    scope = "step" if "kept" in inputs_of(function) else facts.scope.value
    return scope, "; ".join(demands)


def _names_elsewhere(peers: Mapping[str, str]) -> list[str]:
    others = "<br>".join(f"{system}: {prose(said)}" for system, said in peers.items() if system not in SYSTEMS)
    return [*(prose(peers.get(system, "")) for system in SYSTEMS), others]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    """A pipe would end the cell, a star without gaps around it or an underscore at a word's edge begin an emphasis."""
    text = _cell(text).replace("<", "&lt;")
    return re.sub(r"(?<!\w)_|_(?!\w)|(?<! )\*|\*(?! )|`", lambda found: "\\" + found.group(), text)
