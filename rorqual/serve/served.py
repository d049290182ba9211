"""A model as the server sees it: an engine, the tokenizer and template that belong to it, and its name.

The dictionary given to `create_app` maps public names to these, so one model may go by several names (two
names may even share an engine and differ in their defaults, as `deepseek-chat` and `deepseek-reasoner` did);
an answer always carries the model's own name, so that nobody is served another model under a name without
seeing it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import Engine
from rorqual.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request gets when it does not say: generation_config.json's values, and our own `thinking`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    thinking: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, directory: Path, *, thinking: bool = False) -> GenerationDefaults:
        """From a model directory; without a generation_config.json the neutral values. Raises ConfigError."""
        path = directory / "generation_config.json"
        if not path.exists():
            return cls(thinking=thinking)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            greedy = raw.get("do_sample") is False
            return cls(
                temperature=0.0 if greedy else float(raw.get("temperature") or 1.0),
                top_p=float(raw.get("top_p") or 1.0),
                top_k=max(0, int(raw.get("top_k") or 0)),
                max_tokens=None if raw.get("max_new_tokens") is None else int(raw["max_new_tokens"]),
                thinking=thinking,
                min_p=float(raw.get("min_p") or 0.0),
                repetition_penalty=float(raw.get("repetition_penalty") or 1.0),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", remedy="correct the file or delete it") from error


@dataclass(frozen=True, slots=True)
class ServedModel:
    """alias: under a name that programs insist on. They send the limits of the model of that name, so a `max_tokens`
    beyond this one's context means what room there is."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    name: str
    created: int
    owned_by: str = "rorqual"
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    alias: bool = False

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes when an answer may change though the request did not."""
        info = self.engine.info
        identity = (
            self.name,
            info.model,
            info.dtype,
            info.vocab_size,
            info.max_model_len,
            self.template.jinja,
        )
        return "fp_" + hashlib.sha256(repr(identity).encode()).hexdigest()[:12]

    @property
    def has_thinking_switch(self) -> bool:
        """Whether a request can choose (V3 never thinks, R1 always does)."""
        return self.template.supports_thinking and not self.template.starts_in_thinking(False)

    def listing(self, public_name: str) -> dict[str, Any]:
        """The entry of the models list, in OpenAI's words and Anthropic's. `root` and `max_model_len` are vLLM's additions;
        `thinking` is ours: whether the request's `thinking` can be switched on and off, so that a page knows whether to
        show the switch."""
        return {
            "id": public_name,
            "object": "model",
            "created": self.created,
            "owned_by": self.owned_by,
            "root": self.name,
            "parent": None,
            "max_model_len": self.engine.info.max_model_len,
            "thinking": self.has_thinking_switch,
            "type": "model",
            "display_name": public_name,
            "created_at": datetime.fromtimestamp(self.created, UTC).isoformat().replace("+00:00", "Z"),
            "lifecycle": "active",
            "max_input_tokens": self.engine.info.max_model_len,
        }
