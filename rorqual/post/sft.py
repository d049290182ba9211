"""Supervised fine-tuning: the pretraining loop over whole conversations, packed, masked, learning what the assistant says.

DeepSeek-V3 section 5.1: samples are packed into rows and do not see each other. The starting weights come from
`init_from`; the data from `rorqual data prepare` on JSONL with `messages`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rorqual.errors import ConfigError
from rorqual.train.config import RunConfig
from rorqual.train.pretrain import RunRecord, pretrain
from rorqual.train.replicas import ALONE, Replicas

log = logging.getLogger(__name__)


def sft(cfg: RunConfig, say: Callable[[str], None] = log.info, replicas: Replicas = ALONE) -> RunRecord:
    """Run or resume a fine-tuning. Raises ConfigError without `init_from`, and whatever `pretrain` raises."""
    if not cfg.init_from:
        raise ConfigError("fine-tuning needs init_from", remedy="name the model directory to start from")
    return pretrain(cfg, kind="sft", say=say, replicas=replicas)
