"""Models that come with atomc: configurations of the released sizes, and one small trained checkpoint.

`deepseek-v4-flash` and `deepseek-v4-pro` are a `config.json` each (their weights are too large to bundle);
`deepseek-v4-nano` is a whole checkpoint folder.
"""

from pathlib import Path
from typing import Final

from atomc.errors import ConfigError
from atomc.models.deepseek_v4.config import DeepseekV4Config, load_config

_ROOM: Final = Path(__file__).parent
_BUNDLED: Final = {
    "deepseek-v4-flash": _ROOM / "configs" / "deepseek-v4-flash.json",
    "deepseek-v4-nano": _ROOM / "nano" / "deepseek-v4-nano",
    "deepseek-v4-pro": _ROOM / "configs" / "deepseek-v4-pro.json",
}


def bundled_names() -> list[str]:
    """Names `bundled_path` and `bundled_config` know, sorted."""
    return sorted(_BUNDLED)


def bundled_path(name: str) -> Path:
    """The file (configuration only) or folder (checkpoint) behind a bundled name. Raises `ConfigError`."""
    if name not in _BUNDLED:
        raise ConfigError(name, [f"{name!r} is not a bundled model; bundled: {', '.join(bundled_names())}"])
    return _BUNDLED[name]


def bundled_config(name: str) -> DeepseekV4Config:
    """The configuration of a bundled model. Raises `ConfigError` for an unknown name."""
    return load_config(bundled_path(name))
