"""How the commands print tables, numbers and JSON, and write files."""

import json
import math
import os
from pathlib import Path

from command import UserError
from samples import Sample


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(header: list[str], rows: list[list[str]], left: set[int], markdown: bool) -> str:
    """A table as aligned text or Markdown; `left`: the columns that are text and not numbers."""
    if markdown:
        rule = ["---" if column in left else "---:" for column in range(len(header))]
        cells = [header, rule] + [[cell.replace("|", "\\|") for cell in row] for row in rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        padded = (f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def print_json(value) -> None:
    """Prints JSON; numbers that are whole are printed so, and NaN and infinity, which JSON lacks, as null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return None if not math.isfinite(value) else int(value) if value.is_integer() else value
        return value

    print(json.dumps(plain(value), indent=2))


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    target = path.resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"{path}: is not a file")
        try:
            draft.write_bytes(content)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def digits(sample: Sample, form: str) -> list[str]:
    return [shown(value, form) for value in (sample.mean, sample.sd, sample.min, sample.max)]


def shown_p(p: float | None) -> str:
    return shown(p, ".4f" if p is None or p >= 0.0001 else ".1e")
