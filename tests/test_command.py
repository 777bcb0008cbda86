"""How programs end: command.py, by its effects on a process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOGBOOK = ROOT / "records" / "logbook.py"


@pytest.fixture
def start(tmp_path):
    """Starts a program whose work are these lines, and for which KeyError is a user's mistake."""

    def start(*lines: str, run="command.run(main, KeyError)", **options) -> subprocess.Popen:
        program = tmp_path / "program.py"
        head = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport command\n"
        body = "".join(f"    {line}\n" for line in lines)
        program.write_text(f"{head}def main():\n{body}{run}\n")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, program], cwd=tmp_path, **{**pipes, **options})

    return start


@pytest.mark.parametrize(
    "line, status, said",
    [
        ("pass", 0, ""),
        ("return 1", 1, ""),
        ("raise command.UserError('no data; fetch some')", 2, "program.py: no data; fetch some\n"),
        ("raise command.UserError('it diverges', status=3)", 3, "program.py: it diverges\n"),
        ("raise KeyError('such as that of a library')", 2, "program.py: 'such as that of a library'\n"),
        ("open('missing.txt')", 2, "program.py: [Errno 2] No such file or directory: 'missing.txt'\n"),
        ("command.Parser().parse_args(['-x'])", 2, "program.py: unrecognized arguments: -x (see program.py --help)\n"),
    ],
)
def test_program_ends_with_a_status_and_a_line_for_a_mistake(start, line, status, said):
    running = start(line)
    assert running.communicate() == ("", said) and running.returncode == status


def test_error_of_the_program_itself_keeps_its_traceback(start):
    running = start("[][0]")
    assert "Traceback" in running.communicate()[1] and running.returncode == 1


SLEEP = ("try:", "    print('asleep', flush=True)", "    time.sleep(60)", "finally:", "    print('cleaned up')")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_lets_a_program_clean_up_and_is_its_status(start, number, status):
    running = start(*SLEEP)
    assert running.stdout.readline() == "asleep\n"
    running.send_signal(number)
    assert running.communicate() == ("cleaned up\n", "program.py: interrupted\n")
    assert running.returncode == status


def test_program_in_the_background_of_a_shell_ignores_ctrl_c(start):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    running = start("os.kill(os.getpid(), signal.SIGINT)", "print('still here')", preexec_fn=ignore)
    assert running.communicate()[0] == "still here\n" and running.returncode == 0


@pytest.mark.parametrize(
    "line, statuses",
    [
        ("print(100_000 * 'a line\\n')", {141}),
        ("print('a line')", {141}),
        ("command.Parser().parse_args(['-h'])", {0, 141}),  # some of Python's argparse see to it
    ],
)
def test_program_ends_quietly_where_nobody_reads(start, line, statuses):
    reader, writer = os.pipe()
    os.close(reader)
    running = start(line, stdout=writer)
    os.close(writer)
    assert running.communicate()[1] == "" and running.returncode in statuses


def test_logbook_reads_logs_and_gives_back_scripts_with_python_alone(tmp_path):
    log = next(ROOT.glob("records/tiny/*_5_recipe/run_1.txt"))
    for words in (["show", log], ["extract", log, "--out", tmp_path / "script.py"]):
        bare = [sys.executable, "-S", "-E", LOGBOOK, *words]
        subprocess.run(bare, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "script.py").exists()


def test_data_tools_import_neither_torch_nor_training():
    programs = ("download", "embedded", "fineweb", "shards", "text")
    text = f"import sys, {', '.join(programs)}\nsys.exit(bool({{'torch', 'train_gpt'}} & sys.modules.keys()))\n"
    path = os.pathsep.join((str(ROOT), str(ROOT / "data")))
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", text], env=environment, check=True)


def closing(number):
    """What closes a stream of a process before it begins, as `>&-` does."""
    return lambda: os.close(number)


@pytest.mark.parametrize("where", ["no reader", "full disk", "closed"])
def test_program_that_works_for_long_outlives_its_reader(start, tmp_path, where):
    reader, writer = os.pipe()
    os.close(reader)
    stdout = os.open("/dev/full", os.O_WRONLY) if where == "full disk" else writer
    body = ("print('a line', flush=True)", "open('done.txt', 'w').write('all')", "print('another')", "return 1")
    before = closing(1) if where == "closed" else None
    running = start(*body, run="command.run(main, outlives_reader=True)", stdout=stdout, preexec_fn=before)
    assert running.communicate()[1] == "" and running.returncode == 1
    assert (tmp_path / "done.txt").read_text() == "all"  # and not a line that was printed


def test_full_disk_under_the_output_is_a_mistake(start):
    with open("/dev/full", "w") as full:
        running = start("print('a line')", stdout=full)
        said = "program.py: the output cannot be written: No space left on device\n"
        assert running.communicate()[1] == said and running.returncode == 2
        running = start("print('a line')", stdout=full, stderr=full)
        assert running.wait() == 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_closed_stream_lends_its_number_to_no_file(start, tmp_path, number):
    body = ("file = open('done.txt', 'w')", "print(input.__name__)", "print('x', file=sys.stderr)", "file.write('all')")
    running = start(*body, preexec_fn=closing(number))
    running.communicate()
    assert running.returncode == 0 and (tmp_path / "done.txt").read_text() == "all"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminal_without_a_character_shows_its_number(start, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    running = start(r"print('\u2026 \udcff')", r"raise command.UserError('\u2026')", env=environment)
    out, error = running.communicate()
    shown = "…" if encoding == "utf-8" else "\\u2026"
    assert (out, error) == (f"{shown} \\udcff\n", f"program.py: {shown}\n") and running.returncode == 2


PROGRAMS = [*ROOT.glob("data/*.py"), *ROOT.glob("evals/*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("records/**/*.py")]
PROGRAMS = sorted(path for path in [ROOT / "train_gpt.py", *PROGRAMS] if '__name__ == "__main__"' in path.read_text())
PROGRAMS.remove(ROOT / "records" / "legality.py")  # logbook.py starts it


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_ctrl_c_during_imports_prints_no_traceback(program):
    """The interrupt comes in the middle of an import, wherever that is: a stand-in for NumPy sends it."""
    stand_in = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise KeyError\n"
    # By a finder, since a program's folder comes before PYTHONPATH.
    code = (
        "import importlib.abc, importlib.util, runpy, sys\n"
        "class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('numpy', 'torch', 'tqdm', 'array', 'fake_cuda'):\n"
        "            return importlib.util.spec_from_loader(name, self)\n"
        "    def create_module(self, spec):\n"
        "        return None\n"
        "    def exec_module(self, module):\n"
        f"        exec({stand_in!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = [{str(program)!r}, '--help']\n"
        f"sys.path.insert(0, {str(program.parent)!r})\n"
        f"runpy.run_path({str(program)!r}, run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
