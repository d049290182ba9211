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
    api_keys: any of them opens every route; empty: none is asked for (loopback only, see `run.serve`);
    max_body_bytes: larger request bodies are refused unread;
    heartbeat_s: after so long without news a stream says `: keep-alive`, so that proxies keep it open;
    request_timeout_s: a request that has not ended by then is ended with an error, queueing included;
    default_max_tokens: the completion's limit where neither the request nor the model's defaults name one;
    page_dir: the built chat page.

    Raises ConfigError for a value that cannot be meant.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    heartbeat_s: float = 10.0
    request_timeout_s: float = 1800.0
    default_max_tokens: int = 4096
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
        for name in ("max_body_bytes", "heartbeat_s", "request_timeout_s", "default_max_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)!r}")
