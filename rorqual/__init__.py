"""rorqual: the whole DeepSeek-V3 system as one readable package. Importing it loads nothing heavy (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rorqual.engine.api import SamplingParams
    from rorqual.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from rorqual.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from rorqual.engine.api import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'rorqual' has no attribute {name!r}")
