"""Text from files and models, made safe to show on a terminal, in a log or in the message of an error.

python -c "from minem.text import *; print(clean('\x1b[31mred'), visible('\u202e'), redact('hf_' + 10 * 'x'))"
"""

import os
import re
import unicodedata

# Characters that reorder the text around them.
BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
SENTENCE_LIMIT = 2_000  # characters of a sentence; a longer one keeps its beginning and its end
# Tokens of usual services, by their form, and passwords within a URL.
_TOKEN = re.compile(
    r"\b(?:hf_|api_org_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|wandb_v1_)[\w-]{8,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
)
# Values after a name of a secret: --api-key=..., "token": "...", Bearer ...
_NAMED = re.compile(
    r"(?i)((?<!\w)(?:(?:access|auth|hf|hub)[_-])?(?:token|api[_-]?key|secret|password|passwd)[\"']?"
    r"(?:\s*=\s*|\s*:\s*(?=[\"']))|\bbearer\s+)([\"']?)[^\s\"',;]{4,}"
)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|API_?KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD)$", re.IGNORECASE)
REDACTED = "[redacted]"


def clean(text: str, keep_lines: bool = False) -> str:
    """As `visible`, on one line: line breaks and tabs become spaces. With `keep_lines`, they stay."""
    shown = visible(text)
    return shown if keep_lines else shown.replace("\n", " ").replace("\t", " ")


def visible(text: str) -> str:
    """The text with control characters, reordering marks and lone surrogates as escapes, like \\u202e."""
    if text.isascii() and text.isprintable():  # nearly all text is
        return text
    unsafe = {c for c in text if c in BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    return text.replace("\r\n", "\n").translate({ord(c): f"\\u{ord(c):04x}" for c in unsafe - {"\n", "\t"}})


def sentence(text: str) -> str:
    """The text as one line of at most about SENTENCE_LIMIT characters, without secrets: the message of an error."""
    line = redact(clean(text)).strip()
    if len(line) <= SENTENCE_LIMIT:
        return line
    half = SENTENCE_LIMIT // 2
    return f"{line[:half]} [... {len(line) - 2 * half:,} more characters ...] {line[-half:]}"


def redact(text: str) -> str:
    """The text without secrets: values of this environment's tokens and keys, and anything of their form."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name):
            text = text.replace(value, REDACTED)
    return _NAMED.sub(rf"\1\2{REDACTED}", _TOKEN.sub(REDACTED, text))
