"""The server's settings: one frozen dataclass, filled by the command line, read by everything in this room.

No environment is read here and nothing is looked up: what a setting is was decided by whoever made the
`Settings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError

BUILT_PAGE = Path(__file__).parent / "page"  # where `npm run build` in web/ puts the chat page


@dataclass(frozen=True, slots=True)
class Settings:
    """
    api_keys: any of them opens every route, beside those of the database;
    database_url: where keys are kept; None: nowhere. Without any key none is asked for (loopback only, see `run.serve`);
    max_body_bytes: larger request bodies are refused unread;
    max_upload_bytes: ... where a file or a whole conversation is uploaded;
    max_in_flight: requests being answered at once; beyond, 503: each holds a connection and a body;
    heartbeat_s: after so long without news a stream says `: keep-alive`, so that proxies keep it open;
    queue_timeout_s: how long a request waits for its first token, queueing and the reading of the prompt included;
    idle_timeout_s: ... for its next token after that;
    request_timeout_s: a request that has not ended by then is ended with an error, queueing included;
    default_max_tokens: the completion's limit where neither the request nor the model's defaults name one;
    log_prompts: write what was asked and answered into the log too;
    page_dir: the built chat page.

    Raises ConfigError for a value that cannot be meant.
    """

    api_keys: tuple[str, ...] = ()
    database_url: str | None = None
    max_body_bytes: int = 8 << 20
    max_upload_bytes: int = 32 << 20
    max_in_flight: int = 2048
    heartbeat_s: float = 10.0
    queue_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    request_timeout_s: float = 1800.0
    default_max_tokens: int = 4096
    log_prompts: bool = False
    page_dir: Path = BUILT_PAGE

    def __post_init__(self) -> None:
        keys: object = self.api_keys
        if isinstance(keys, str):  # its characters would be the keys
            raise ConfigError("api_keys must be a tuple of strings", remedy="write (key,)")
        if not all(key.strip() and key.isascii() for key in self.api_keys):
            raise ConfigError(
                "api_keys must be non-empty ASCII strings",
                remedy="remove the blank key or write a longer one",
            )
        positive = "max_body_bytes max_upload_bytes max_in_flight heartbeat_s queue_timeout_s idle_timeout_s"
        for name in (*positive.split(), "request_timeout_s", "default_max_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)!r}")
