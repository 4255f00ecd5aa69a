"""What must not be shown: tokens and passwords, wherever a configuration is printed, stored or quoted in an error."""

import re
from typing import Any

HIDDEN = "***"

NAMES = re.compile(
    r"(.*_)?(secret|password|passwd|api_?key|access_?key|credentials?)|((hf|hub|auth|use_auth|access|api|wandb)_)?token",
    re.IGNORECASE,
)
VALUES = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redacted(text: str) -> str:
    """The text with everything that looks like a credential replaced."""
    return VALUES.sub(HIDDEN, text)


def without_secrets(value: Any, name: str = "") -> Any:
    """The same plain value, with credentials replaced, by their look or by the name they stand under."""
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if NAMES.fullmatch(name) else redacted(value)
