"""What DeepSeek's API costs, as published: data, to say what a conversation would have cost there.

Prices changed often and depend on the hour since August 2026 (peak is Monday to Friday, 01:00 to 04:00 and 06:00 to 10:00
UTC, but for Chinese public holidays); so each row has the day from which it held.
Source: api-docs.deepseek.com, pricing, as of November 2026, and its change log.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million tokens: of the prompt where it was not cached and where it was, and of the completion."""

    name: str
    since: str
    input_miss: float
    input_hit: float
    output: float

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """In dollars."""
        missed = prompt_tokens - cached_tokens
        return (missed * self.input_miss + cached_tokens * self.input_hit + completion_tokens * self.output) / 1e6


DEEPSEEK = (
    Price("deepseek-flash, off-peak", "2026-09-10", 0.15, 0.003, 0.60),
    Price("deepseek-flash, peak", "2026-09-10", 0.30, 0.006, 1.20),
    Price("deepseek-v4-pro, off-peak", "2026-09-10", 0.66, 0.022, 1.98),
    Price("deepseek-v4-pro, peak", "2026-09-10", 1.32, 0.044, 3.96),
    Price("deepseek-chat, V3.2", "2025-09-29", 0.28, 0.028, 0.42),
    Price("deepseek-chat, V3", "2025-02-09", 0.27, 0.07, 1.10),
    Price("deepseek-reasoner, R1", "2025-02-09", 0.55, 0.14, 2.19),
)
