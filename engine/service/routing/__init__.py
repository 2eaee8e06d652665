"""Which engine answers which rows, where there are several: D2LPM (arXiv 2501.14312) and its baselines.

Pure Python, no torch, no Spark, no sockets: the coordinator asks a Router, and so does the simulator.
"""

from spark_llm.engine.service.routing.group import Block, Path, PrefixGroup, Run, path_of, runs_of
from spark_llm.engine.service.routing.policies import POLICIES
from spark_llm.engine.service.routing.router import Queued, Router, Share

__all__ = ["POLICIES", "Block", "Path", "PrefixGroup", "Queued", "Router", "Run", "Share", "path_of", "runs_of"]
