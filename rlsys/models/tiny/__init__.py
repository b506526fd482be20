"""The embedded default model: about 0.8 million parameters, made and warmed up on one CPU core in under a minute."""

from rlsys.models.tiny.make import TinySummary, make_tiny, tiny_model_path

__all__ = ["TinySummary", "make_tiny", "tiny_model_path"]
