"""Read a PTX file: its files, variables, functions and, in a function, its statements."""

from __future__ import annotations

import dataclasses
import os
import re

from tests.emu import ptx_ops as ops

GUARD = 32  # bytes between shared variables, checked after each block and poisoned under asan


class TranslationError(NotImplementedError):
    """The PTX holds something that the emulator cannot run: what, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class Variable:
    """A declared variable of any state space but .reg."""

    name: str
    type: str
    count: int  # 0: extern, sized by the launch
    align: int
    initial: str = ""

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.count * int(re.sub(r"\D", "", self.type)) // 8


@dataclasses.dataclass(frozen=True)
class Function:
    """A kernel (.entry) or a device function (.func) with its untranslated body."""

    name: str
    is_kernel: bool
    results: list[Variable]
    params: list[Variable]
    attributes: str
    body: str

    @property
    def cpp(self) -> str:
        """Its name in C++."""
        return identifier("f_", self.name)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: ``ld.global.v2.f32 {%f1, %f2}, [%rd1+8]``."""

    opcode: str
    operands: list[str]
    scope: int

    @property
    def parts(self) -> list[str]:
        """The words of the opcode."""
        return self.opcode.split(".")

    @property
    def types(self) -> list[str]:
        """The types among them."""
        return [p for p in self.parts if p in ops.C_TYPES]

    @property
    def type(self) -> str:
        """The last of them, by which most operands are read."""
        return self.types[-1] if self.types else "b32"


_DECLARATION = re.compile(
    r"\.(?P<space>param|shared|local|global|const)\s*(?:\.align\s+(?P<align>\d+)\s+)?\s*\.(?P<type>[bsuf]\d+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?"
    r"\s*(?:=\s*(?P<initial>.*))?$",
    re.S,
)
_FUNCTION = re.compile(
    r"\.(?P<kind>entry|func)\s+(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?(?P<attributes>.*)$",
    re.S,
)
_STATEMENT = re.compile(
    r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<open>\{)|(?P<close>\})|(?P<label>[$%\w]+)\s*:(?!:)|(?P<text>[^;]*);)\s*"
)


def declaration(text: str) -> Variable:
    match = _DECLARATION.match(text.strip())
    if not match:
        raise TranslationError(
            f"the emulator cannot read the PTX declaration {text.strip()[:120]!r}"
        )
    count = int(match["count"] or 0) if match["array"] else 1
    size = int(match["type"][1:]) // 8
    return Variable(
        match["name"], match["type"], count, int(match["align"] or size), match["initial"] or ""
    )


def _declarations(text: str | None) -> list[Variable]:
    return [
        declaration(item)
        for item in (text or "").split(",")
        if item.strip() and item.strip() != "_"
    ]


def operands(text: str) -> list[str]:
    """Split at the commas outside braces, brackets and parentheses."""
    found = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{}\[\]()])+", text)
    return [item.strip() for item in found if item.strip()]


def identifier(prefix: str, name: str) -> str:
    """A C++ name for a PTX name."""
    return prefix + re.sub(r"\W", "_", name)


class Lines:
    """Follows .loc: the line of the project's own file that an instruction comes from."""

    def __init__(self, files: dict[str, str], toolkit: str) -> None:
        self.files, self.toolkit, self.callers = (
            files,
            toolkit,
            dict[tuple[str, str, str], tuple[str, str, str]](),
        )
        self.where = ("1", "0", "0")

    def see(self, loc: str) -> None:
        match = re.match(r"\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?", loc)
        if not match or match[2] == "0":
            return
        where = (match[1], match[2], match[3])
        if match[4]:
            self.callers[where] = (match[4], match[5], match[6])
        seen = set()  # a function of the toolkit's headers: name the line that uses it
        while self._is_toolkit(where) and where in self.callers and where not in seen:
            seen.add(where)
            where = self.callers[where]
        self.where = where

    def _is_toolkit(self, where: tuple[str, str, str]) -> bool:
        return bool(self.toolkit) and os.path.normpath(self.files[where[0]]).startswith(
            self.toolkit
        )

    def directive(self) -> str:
        return (
            f'#line {self.where[1]} "{self.files[self.where[0]]}"'
            if self.where[0] in self.files
            else ""
        )

    def text(self) -> str:
        return f"{self.files.get(self.where[0], '?')}:{self.where[1]}"


@dataclasses.dataclass
class Module:
    """A parsed PTX file."""

    files: dict[str, str]
    variables: list[Variable]
    shared: list[
        Variable
    ]  # of module scope or of a device function; offsets are the same in every kernel
    functions: list[Function]
    externs: set[str]


def parse(ptx: str) -> Module:
    """Split a PTX file into its variables and functions."""
    ptx = re.sub(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or "", ptx, flags=re.S)
    module = Module(dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx)), [], [], [], set())
    ptx = re.sub(
        r"\.(?:file|version|target|address_size)\b[^\n]*\n|\.section[^{]*\{[^}]*\}", "\n", ptx
    )
    at = 0
    while match := re.compile(r"\s*([^;{=]*)([;{=])", re.S).match(ptx, at):
        head, at = match[1].strip(), match.end()
        if match[2] == "{":
            at, start, depth = match.end(), match.end(), 1
            while depth:
                depth += {"{": 1, "}": -1}.get(ptx[at], 0)
                at += 1
            function = _function(head, ptx[start : at - 1])
            module.functions.append(function)
        elif ".func" in head:
            if ".extern" in head and (found := _FUNCTION.search(head)):
                module.externs.add(found["name"])
        elif re.search(r"\.(global|const|shared)\b", head):
            if match[2] == "=":
                end = ptx.index(";", at)
                head, at = head + "=" + ptx[at:end], end + 1
            if ".extern" in head and ".shared" not in head:
                raise TranslationError(
                    f"a variable of another translation unit: {head}; the emulator links none"
                )
            head = re.sub(
                r"\.(?:visible|extern|weak|common)\s+|\.attribute\([^)]*\)\s*", "", head
            ).strip()
            (module.shared if head.startswith(".shared") else module.variables).append(
                declaration(head)
            )
    for function in module.functions:
        if not function.is_kernel:
            module.shared += shared_in(function)
    return module


def _function(head: str, body: str) -> Function:
    match = _FUNCTION.search(head)
    if not match:
        raise TranslationError(f"the emulator cannot read the PTX function {head[:120]!r}")
    if "cluster" in match["attributes"]:
        raise TranslationError(
            f"kernel {match['name']} asks for clusters, which the emulator does not have"
        )
    results, params = _declarations(match["results"]), _declarations(match["params"])
    return Function(
        match["name"], match["kind"] == "entry", results, params, match["attributes"], body
    )


def shared_in(function: Function) -> list[Variable]:
    return [declaration(text) for text in re.findall(r"^\s*(\.shared[^;]*);", function.body, re.M)]


@dataclasses.dataclass
class Layout:
    """Where a kernel's static shared variables lie."""

    offsets: dict[str, int]
    size: int  # with guards
    needed: int  # as on the GPU, for the limits
    ends: list[tuple[str, int]]


def layout(module: Module, kernel: Function) -> Layout:
    """Place the module's shared variables, if the kernel gets to one, and then its own.

    A device function has one translation for all kernels, so the module's variables lie where they
    lie; only those that the kernel reaches count as needed.
    """
    words, queue = set[str](), [kernel]
    functions = {f.name: f for f in module.functions}
    while queue:
        new = set(re.findall(r"[\w$]+", queue.pop().body)) - words
        words |= new
        queue += [functions[name] for name in new if name in functions]
    common = (
        module.shared if not kernel.is_kernel or any(v.name in words for v in module.shared) else []
    )
    result = Layout({}, 0, 0, [])
    for v in [*common, *(shared_in(kernel) if kernel.is_kernel else [])]:
        if v.count:
            start = -(-result.size // v.align) * v.align
            result.offsets[v.name], result.size = start, start + v.size + GUARD
            result.ends.append((v.name, start + v.size))
            if v.name in words:
                result.needed = -(-result.needed // v.align) * v.align + v.size
    result.size = -(-result.size // 1024) * 1024  # any alignment of the dynamic part
    return result


@dataclasses.dataclass(frozen=True)
class Statement:
    """A piece of a function's body: `kind` is loc, label, directive or instruction."""

    kind: str
    text: str
    scope: int


def statements(body: str) -> tuple[list[Statement], list[int]]:
    """Split a body into statements; the second result is the parent of each scope."""
    found, parents, scope, at = list[Statement](), [0], 0, 0
    body = body.rstrip()
    while at < len(body):
        match = _STATEMENT.match(body, at)
        if not match:
            raise TranslationError(f"the emulator cannot read the PTX near {body[at : at + 80]!r}")
        at = match.end()
        if match["open"]:
            parents.append(scope)
            scope = len(parents) - 1
        elif match["close"]:
            scope = parents[scope]
        elif match["loc"]:
            found.append(Statement("loc", match["loc"], scope))
        elif match["label"]:
            found.append(Statement("label", match["label"], scope))
        elif text := (match["text"] or "").strip():
            found.append(
                Statement("directive" if text.startswith(".") else "instruction", text, scope)
            )
    return found, parents


def instruction(text: str, scope: int) -> tuple[str, Instruction]:
    """Split ``@!%p1 bra $L1`` into its guard, empty or ``!%p1``, and the instruction."""
    match = re.match(r"(?:@\s*(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
    if not match:
        raise TranslationError(f"the emulator cannot read the PTX instruction {text!r}")
    return match[1] or "", Instruction(match[2], operands(match[3]), scope)
