"""spark-llm: language models inside analytical SQL, on Apache Spark.

Public names load on first use, so that ``import spark_llm`` is light: no torch, no pyspark.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "enable": "spark_llm.session",
    "session": "spark_llm.session",
    "compare_orders": "spark_llm.compare",
    "OrderComparison": "spark_llm.compare",
    "explain": "spark_llm.explaining",
    "Explanation": "spark_llm.explaining",
    "prompt": "spark_llm.functions.prompts",
    "clear_cache": "spark_llm.cache",
    "last_report": "spark_llm.report",
    "reports": "spark_llm.report",
    "Report": "spark_llm.report",
    "LlmError": "spark_llm.errors",
}

if TYPE_CHECKING:
    from spark_llm.cache import clear_cache as clear_cache
    from spark_llm.compare import OrderComparison as OrderComparison
    from spark_llm.compare import compare_orders as compare_orders
    from spark_llm.errors import LlmError as LlmError
    from spark_llm.explaining import Explanation as Explanation
    from spark_llm.explaining import explain as explain
    from spark_llm.functions.prompts import prompt as prompt
    from spark_llm.report import Report as Report
    from spark_llm.report import last_report as last_report
    from spark_llm.report import reports as reports
    from spark_llm.session import enable as enable
    from spark_llm.session import session as session

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        # All names of the module at once: its import puts the module itself where a name is its own (session).
        for other, module in _EXPORTS.items():
            if module == _EXPORTS[name]:
                globals()[other] = getattr(importlib.import_module(module), other)
        return globals()[name]
    raise AttributeError(f"module 'spark_llm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
