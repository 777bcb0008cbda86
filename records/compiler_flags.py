"""Flags for torch.compile and what is below it: those that a script sets when it runs, and those that its text has."""

import ast
import os
import re
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch.utils._config_module import ConfigModule

COMPILER = ("torch.compiler.", "torch._dynamo.", "torch._functorch.", "torch._inductor.")
VARIABLE = re.compile(r"TORCH_?(INDUCTOR|DYNAMO|COMPILE|AOT)\w*")
# What else in the environment says how to compile, and with what.
ENVIRONMENT = re.compile(rf"{VARIABLE.pattern}|TRITON_\w+|NVCC_\w+|CXX|CC|(C|CXX|CPP|LD)FLAGS|PATH|LD_PRELOAD")
USUAL = {"backend": ("inductor",), "mode": (None, "default"), "options": (None,)}  # what torch.compile does unasked


class CompilerWatch:
    """Notes the flags that a script gives to the compiler from now on; torch.compile itself compiles nothing."""

    def __init__(self, path: Path):
        self.path, self.flags, self.by_torch = path, {}, set()
        self.before = self.state()
        set_attribute, watch = ConfigModule.__setattr__, self

        def compile(model=None, *, dynamic=None, fullgraph=False, disable=False, **flags):
            for name, value in flags.items():
                if value not in USUAL.get(name, ()):
                    watch.note(f"torch.compile({name}={value!r})")
            return (lambda model: model) if model is None else model

        def set_flag(module, name, value):
            set_attribute(module, name, value)
            if module.__name__.startswith(COMPILER) and not name.startswith("_"):
                watch.note(f"{module.__name__}.{name} = {value!r}")

        torch.compile, ConfigModule.__setattr__ = compile, set_flag

    def note(self, flag: str) -> None:
        """Notes a flag with the line that set it, unless PyTorch set it for itself."""
        between = {function.__code__.co_filename for function in (CompilerWatch.note, ConfigModule.patch)}
        stack = reversed(traceback.extract_stack())
        setter = next(frame for frame in stack if frame.filename not in between)
        if Path(torch.__file__).parent in Path(setter.filename).parents:
            self.by_torch.add(flag.partition(" = ")[0])
        else:
            file = "" if setter.filename == str(self.path) else f"{setter.filename} "
            self.flags.setdefault(f"{file}line {setter.lineno}", flag)

    @staticmethod
    def state() -> dict:
        """All flags: those of the compiler's modules, and the environment's."""
        modules = [m for name, m in sys.modules.items() if isinstance(m, ConfigModule) and name.startswith(COMPILER)]
        flags = {f"{m.__name__}.{key}": value for m in modules for key, value in m.get_config_copy().items()}
        return flags | {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}

    def findings(self) -> list[str]:
        """What was set, and by which line where that is known."""
        findings = [f"{where}: {flag}" for where, flag in self.flags.items()]
        known = {flag.partition(" = ")[0] for flag in self.flags.values()} | self.by_torch
        for name, value in self.state().items():
            # A module of flags that has been imported since is no change; a variable is.
            if name not in known and self.before.get(name, value if "." in name else None) != value:
                findings.append(f"{name} = {value!r}")
        return findings


PLAIN = ("dynamic", "fullgraph", "disable")  # words of torch.compile that are no flags for the compiler
MENTION = re.compile(  # of flags, in the text of a script or in a string of it
    r"\b_(?:inductor|dynamo|functorch)\W*(?:\.|import|'|\")\W*config\b|\b_inductor\b|\bconfig_patches\b"
    rf"|max-autotune|reduce-overhead|{VARIABLE.pattern}"
)


def words_of(call: ast.Call) -> list[ast.keyword]:
    """The keywords of a call, also those of a dictionary that is written out behind two stars."""
    words = []
    for word in call.keywords:
        entries = word.value
        if word.arg is None and isinstance(entries, ast.Dict):
            for key, value in zip(entries.keys, entries.values):
                words.append(ast.keyword(getattr(key, "value", None), value))
        elif word.arg is None and isinstance(entries, ast.Call) and ast.unparse(entries.func) == "dict":
            words += words_of(entries)
        else:
            words.append(word)
    return words


def flags_in_source(path: Path) -> dict[int, str]:
    """Mentions of compiler flags by line, also in what only a GPU runs."""
    flags = {}
    tree = ast.parse(path.read_bytes())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom):
            found = [ast.unparse(node)] * bool(MENTION.search(ast.unparse(node)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found = [node.value] * bool(MENTION.search(node.value))
        elif isinstance(node, ast.keyword) and node.arg:
            found = [ast.unparse(node)] * bool(MENTION.search(node.arg))
        elif isinstance(node, ast.Call):
            # torch.compile itself, or what is told to call it.
            for part in (node.func, *node.args):
                name = ast.unparse(part)
                if name.endswith("compile") and name != "re.compile":
                    found = [f"{name}({ast.unparse(word)})" for word in words_of(node) if not is_plain(word)]
                    break
        for flag in found:
            flags.setdefault(node.lineno, flag)
    return flags


def is_plain(word: ast.keyword) -> bool:
    """Whether a keyword of torch.compile says no more than what it does unasked."""
    if isinstance(word.value, ast.Constant) and word.value.value in USUAL.get(word.arg, ()):
        return True
    return word.arg in PLAIN
