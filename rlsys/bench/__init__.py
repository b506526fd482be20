"""Measurements of the system's parts: what ``rlsys bench NAME`` runs. One file each, with a function ``measure``."""

from collections.abc import Mapping

BENCHES: Mapping[str, str] = {
    "objective": "time and memory of every policy loss over a million packed tokens, forward and backward",
    "weight-sync": "carrying weights from the learner's memory into serving engines: the copies, and the pauses",
    "trainer": "a learner's step: packed against padded, against bare DeepSpeed and a naive loop; log-probabilities",
    "overlap": "what overlapping rollouts and training gains over synchronous training, on two cores",
}
