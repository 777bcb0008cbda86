"""The tables of records/README.md, written from the records that lie beside it."""

import re
from pathlib import Path
from urllib.parse import quote

from command import UserError
from printing import shown, shown_p, table, write_file
from samples import loss_sample, p_at_most, results, time_sample

RECORDS = Path(__file__).resolve().parent
# What lies between these two lines of README.md is rewritten: the records of one folder, held against a target.
TABLE = re.compile(r"(<!-- leaderboard: (\S+), target (\d+(?:\.\d+)?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
RECORD_NAME = re.compile(r"(\d{4}-\d\d(?:-\d\d)?)_.+")
TITLE = re.compile(r"^#+[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
CONTRIBUTORS = re.compile(r"^[*_]*Contributors?:[*_]*[ \t]*(.*?)[ \t]*$", re.MULTILINE)


def leaderboard(args) -> int:
    """Rewrites the tables in records/README.md, or, with --check, says whether they are what it would write."""
    readme = RECORDS / "README.md"
    text = read_text(readme)
    tracks = {match[2] for match in TABLE.finditer(text)}
    for folder in folders(RECORDS):
        if folder.name not in tracks and any(RECORD_NAME.fullmatch(record.name) for record in folders(folder)):
            marker = f"<!-- leaderboard: {folder.name}, target ... -->"
            raise UserError(f"{folder}: README.md has no table for it ({marker})")
    current = TABLE.sub(lambda match: match[1] + track_table(match[2], float(match[3])) + match[5], text)
    if args.check:
        print(f"{readme}: {'up to date' if current == text else 'out of date; run the leaderboard command'}")
        return 0 if current == text else 1
    if current != text:
        write_file(readme, current.encode())
    print(f"{readme}: {'rewritten' if current != text else 'up to date'}")
    return 0


def track_table(track: str, target: float) -> str:
    """The records in a track's folder, oldest first, as a Markdown table."""
    header = ["#", "date", "record", "mean loss ± sd", "runs", "mean time", f"p (≤ {target:g})", "contributors"]
    rows = []
    for folder in folders(RECORDS / track):
        if not (name := RECORD_NAME.fullmatch(folder.name)):
            raise UserError(f"{folder}: a record's folder is named <date>_<name>, like 2026-05-31_sign_trick")
        text = read_text(folder / "README.md")
        if not (title := TITLE.search(text)):
            raise UserError(f"{folder / 'README.md'}: has no heading to take the record's title from")
        contributors = CONTRIBUTORS.search(text)
        logs = sorted(str(path) for path in folder.rglob("*.txt"))
        if not logs:
            raise UserError(f"{folder}: holds no logs (*.txt)")
        runs, whole = results(logs)
        if not whole:
            raise UserError(f"{folder}: holds logs that do not count; README.md is left as it is")
        loss, time = loss_sample(runs), time_sample(runs)
        rows.append(
            [
                str(len(rows) + 1),
                name[1],
                f"[{title[1]}]({quote(track)}/{quote(folder.name)}/)",
                f"{loss.mean:.4f} ± {shown(loss.sd, '.4f')}",
                str(loss.n),
                "-" if time is None else f"{time.mean / 1000:,.2f} s",
                shown_p(p_at_most(loss, target)),
                contributors[1] if contributors else "",
            ]
        )
    return (table(header, rows, {1, 2, 7}, True) if rows else "No records yet.") + "\n"


def folders(parent: Path) -> list[Path]:
    """The folders in a folder that may hold records, by name; none if it does not exist."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and path.name[0] not in "._")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
