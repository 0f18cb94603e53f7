"""How much a compressed file may unfold to."""

from __future__ import annotations

from pathlib import Path

TIMES, ALWAYS = 100, 1 << 30


def unfolded(path: Path) -> int:
    """Bytes: TIMES the size of the file, or ALWAYS if that is less. Pictures compress 2 to 20 times; a bomb of zeros 1000 times."""
    return max(TIMES * path.stat().st_size, ALWAYS)
