"""Find files of text and read their documents, for text.py.

What is no text is refused, in a line that names the file: training would learn the garbage in silence.
"""

import argparse
import codecs
import gzip
import io
import json
import os
import stat
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from command import UserError, first_line, missing

# fmt: off
TEXT_SUFFIXES = {
    ".c", ".cc", ".cpp", ".cu", ".cuh", ".css", ".go", ".h", ".hpp", ".htm", ".html", ".java", ".jl", ".js", ".kt",
    ".lua", ".m", ".markdown", ".md", ".org", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala", ".sh",
    ".sql", ".swift", ".tex", ".text", ".toml", ".ts", ".txt", ".yaml", ".yml",
}
# fmt: on
LINE_SUFFIXES = {".jsonl", ".ndjson"}
COMPRESSIONS = {".gz", ".zst"}
BYTE_ORDER_MARKS = (  # UTF-32's before UTF-16's, with which one of them begins
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_encoding(name):
    """An argparse `type`: the name of a Python codec that decodes text."""
    try:
        b"a\xff".decode(name, "ignore")
    except (LookupError, UnicodeError):  # UnicodeError: idna and its like, which are for names, not for files
        raise argparse.ArgumentTypeError(
            f"expected an encoding of text that Python knows, such as latin-1, found {name}"
        ) from None
    return name


def suffixes(path):
    """The suffix that says how `path` is read, and that of its compression or "", both in lower case."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def import_pyarrow(path):
    """pyarrow, which reading `path` needs."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: {missing('pyarrow', 'data/requirements.txt')}") from None
    return pyarrow


@contextmanager
def opened(path):
    """`path` as a file of bytes; UserError, which names it, if those who read from it fail."""
    try:
        with open(path, "rb") as file:
            yield file
    except (EOFError, OSError, zlib.error) as error:
        if getattr(error, "filename", None):
            raise
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def decompressed(path, file):
    """`file`, opened from `path`, or what it holds in compressed form, as a file."""
    _, compression = suffixes(path)
    if not compression:
        return file
    if not file.peek(1):  # gzip and pyarrow take it for a whole file of nothing
        raise EOFError("an empty file is not compressed")
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(import_pyarrow(path).input_stream(file, compression="zstd"))


def search(folder):
    """The files under `folder`, sorted, without hidden ones and those in hidden folders."""

    def fail(error):
        raise error

    for place, subfolders, names in os.walk(folder, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file():  # a broken link is none
                yield path


def bad_byte(error):
    """The byte that a UnicodeDecodeError is about."""
    return f"byte {error.start:,} (0x{error.object[error.start]:02x})"


def find_fault(text):
    """The index of the first character that text does not hold, and what it is, or None."""
    zero = text.find("\0")
    if zero >= 0:
        return zero, "a zero, as in binary files"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start, "half of a surrogate pair"
    return None


def byte_position(data, text, index, encoding):
    """Where in `data` (bytes) the character `text[index]` lies; `text` is `data` decoded."""
    mark = "".encode(encoding)  # utf-16 begins with one, whatever it encodes
    return len(data) - len(text[index:].encode(encoding, "replace")) + len(mark)


class Reader:
    """Finds files, reads their documents, and counts what it leaves out.

    encoding: of text files; records are UTF-8, as JSON is.
    skip_bad: leave out files and records that are not text, which are refused otherwise.
    skipped: counts of files and records by what they are; passed_over: counts of files by their suffix, which is not
    among those that are read.
    """

    def __init__(self, encoding="utf-8", skip_bad=False):
        self.encoding = encoding
        self.skip_bad = skip_bad
        self.skipped = Counter()
        self.passed_over = Counter()

    def find(self, paths):
        """The files to read among `paths` (files, pipes and folders), each once."""
        files, left_out = {}, {}  # by where they lie; a dict keeps the order
        for path in map(Path, paths):
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                raise UserError(f"{path}: no such file or folder") from None
            if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
                files.setdefault(path.resolve(), path)
            elif stat.S_ISDIR(mode):
                for file in search(path):
                    count = self.reason_to_leave_out(file)
                    if count:
                        left_out[file.resolve()] = count
                    else:
                        files.setdefault(file.resolve(), file)
            else:
                raise UserError(f"{path}: expected a file, a folder or a pipe")
        for place, (counter, what) in left_out.items():
            if place not in files:  # it may have been named
                counter[what] += 1
        return list(files.values())

    def reason_to_leave_out(self, path):
        """Why a file in a folder is not read: the counter for it and what to count there. None if it is read."""
        suffix, compression = suffixes(path)
        if suffix in TEXT_SUFFIXES:
            return (self.skipped, "binary files") if self.is_binary(path) else None
        if suffix in LINE_SUFFIXES or suffix == ".parquet" and not compression:
            return None
        return self.passed_over, suffix + compression or "without a suffix"

    def is_binary(self, path):
        with opened(path) as file:
            head = decompressed(path, file).read(8192)
        return "\0" in head.decode(self.encoding, "ignore")

    def notes(self):
        """Lines about what was left out."""
        lines = [f"skipped {count:,} {what}" for what, count in self.skipped.items()]
        if self.passed_over:
            most = self.passed_over.most_common(10)
            counts = [f"{count:,} {suffix}" for suffix, count in most]
            others = self.passed_over.total() - sum(count for _, count in most)
            lines.append(f"passed over: {', '.join(counts)}{f', {others:,} others' if others else ''}")
        return lines

    def bad(self, where, fault, kind):
        """What is not text is refused, or counted with --skip-bad. kind: "files" or "records"."""
        if not self.skip_bad:
            raise UserError(f"{where}: {fault}, or --skip-bad to leave such {kind} out")
        self.skipped[f"bad {kind}"] += 1

    def read(self, path, file):
        """Yield the documents (str) of `file`, opened from `path`."""
        suffix, compression = suffixes(path)
        if suffix == ".parquet":
            if compression:
                raise UserError(f"{path}: parquet has its own compression: decompress the file first")
            yield from self.read_parquet(path, file)
            return
        content = decompressed(path, file)  # has a name, since pyarrow's closes `file` when it goes away
        if suffix in LINE_SUFFIXES:
            yield from self.read_lines(path, content)
        else:
            yield from self.read_text(path, content)

    def read_text(self, path, file):
        """A whole file is a document."""
        data = file.read()
        try:
            text = data.decode(self.encoding)
        except UnicodeDecodeError as error:
            fault = f"{bad_byte(error)} is not {self.encoding}"
        else:
            found = find_fault(text)
            if not found:
                yield text.removeprefix("\ufeff")  # a byte order mark
                return
            index, what = found
            fault = f"byte {byte_position(data, text, index, self.encoding):,} is {what}"
        remedy = "give the text's --encoding (latin-1 or utf-16, say)"
        for mark, encoding in BYTE_ORDER_MARKS:
            if data.startswith(mark) and codecs.lookup(self.encoding).name != encoding:
                fault, remedy = f"looks like {encoding.upper()}", f"--encoding {encoding}"
                break
        self.bad(path, f"{fault}: {remedy}", "files")

    def read_lines(self, path, file):
        """Each line is a document: a JSON object with a text field."""
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                content = line.decode()
            except UnicodeDecodeError as error:
                self.bad(where, f"{bad_byte(error)} is not utf-8, as JSON is: convert the file", "records")
                continue
            if number == 1:
                content = content.removeprefix("\ufeff")  # a byte order mark
            if not content.strip():
                continue
            try:
                record = json.loads(content)
            except ValueError as error:
                if b"\0" not in line:
                    raise UserError(f"{where}: not JSON: {error}") from error
                self.bad(where, f"byte {line.index(0):,} is a zero, as in binary files: mend it", "records")
                continue
            except RecursionError:
                raise UserError(f"{where}: not a record: its JSON is nested too deeply") from None
            if not isinstance(record, dict) or "text" not in record:
                raise UserError(f"{where}: expected an object with a text field")
            text = record["text"]
            if not isinstance(text, str | None):
                raise UserError(f"{where}: expected a text field that holds a string, found {type(text).__name__}")
            if self.is_document(where, text):
                yield text

    def read_parquet(self, path, file):
        """Each row is a document: a string in the text column."""
        pyarrow = import_pyarrow(path)
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
                names = parquet.schema_arrow.names
                if names.count("text") != 1:
                    raise UserError(f"{path}: expected one text column, found {', '.join(names)}")
                kind = parquet.schema_arrow.field("text").type
                values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if str(values) not in {"string", "large_string", "string_view"}:
                    raise UserError(f"{path}: expected a text column of strings, found {kind}")
                for rows in parquet.iter_batches(batch_size=1024, columns=["text"]):
                    for value in rows["text"]:
                        row += 1
                        where = f"{path}: row {row:,}"
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError as error:
                            self.bad(where, f"{bad_byte(error)} of its text is not utf-8: mend it", "records")
                            continue
                        if self.is_document(where, text):
                            yield text
        # A damaged file may have columns of other names than it says.
        except (pyarrow.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from error

    def is_document(self, where, text):
        """Whether a record's text (str or None) is a document. Else it is counted, or refused."""
        if text is None:
            self.skipped["null records"] += 1
            return False
        fault = find_fault(text)
        if fault:
            index, what = fault
            self.bad(where, f"character {index:,} of its text is {what}: mend it", "records")
            return False
        return True
