"""The special tokens of the DeepSeek-V3 family, spelled once.

The bars are U+FF5C and the low lines U+2581; only `<think>`, `</think>` and `<|EOT|>` are plain ASCII. Order
is that of a vocabulary trained here (beginning, end and padding are ids 0, 1, 2, as published). As published,
too, only `CONTROL` tokens count as "special" when text is decoded: role, tool and thinking markers stay
visible there, because parsers of other engines look for them.
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK = "<think>"
END_THINK = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
EOT = "<|EOT|>"
TOOL_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
TOOL_CALLS_END = "<｜tool▁calls▁end｜>"
TOOL_CALL_BEGIN = "<｜tool▁call▁begin｜>"
TOOL_CALL_END = "<｜tool▁call▁end｜>"
TOOL_OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
TOOL_OUTPUTS_END = "<｜tool▁outputs▁end｜>"
TOOL_OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
TOOL_OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"
SEARCH_BEGIN = "<｜search▁begin｜>"
SEARCH_END = "<｜search▁end｜>"

SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    THINK,
    END_THINK,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    EOT,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    TOOL_OUTPUT_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_SEP,
    SEARCH_BEGIN,
    SEARCH_END,
)
CONTROL = frozenset((BOS, EOS, PAD, EOT))
