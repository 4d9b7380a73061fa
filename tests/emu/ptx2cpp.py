"""Translate PTX (``nvcc -ptx -lineinfo``) to C++ for the fiber engine: an instruction, a statement.

Why: no GPU runs on every commit, yet the kernels shall. The PTX that nvcc makes of the unchanged
sources is the last form of them that is documented, portable and textual; a C++ statement for each
of its instructions, executed by engine.cpp as one fiber per CUDA thread, runs the real index maths,
the real inline assembly and the real synchronisation in pytest, under sanitizers, with errors that
name the line of the .cu file.

How: `translate` splits a module into variables and functions; `Body` walks a function's statements
and looks each opcode up in the tables of ptx_ops.py and ptx_statements.py, by the row with the most
matching words. A register becomes a C++ variable of its declared type; reading it as another type
reinterprets its bits (`as`, ptx.h). State spaces share one 64-bit address space, shared memory
lying below 4 GiB.

What it refuses, with the source line and the place to add it: an opcode, modifier or operand that
no row knows; clusters, wgmma, TMA, mbarriers, tensor memory; functions of another translation unit.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.emu import ptx_ops as ops
from tests.emu.ptx_parse import (
    Function,
    Instruction,
    Layout,
    Lines,
    Module,
    TranslationError,
    Variable,
    declaration,
    identifier,
    instruction,
    layout,
    operands,
    parse,
    statements,
)
from tests.emu.ptx_statements import STATEMENTS


class Body:
    """One function's statements in C++."""

    def __init__(self, module: Module, function: Function, shared: Layout, lines: Lines) -> None:
        self.module, self.function, self.shared, self.lines = module, function, shared, lines
        self.statements, self.parents = statements(function.body)
        self.registers: dict[tuple[int, str], str] = {}
        self.arrays: dict[tuple[int, str], Variable] = {}  # .local and .param variables
        self.labels: set[tuple[int, str]] = set()
        self.tables: dict[str, list[str]] = {}
        self.text = ""
        label = ""
        for statement in self.statements:
            if statement.kind == "label":
                label = statement.text
                self.labels.add((statement.scope, label))
            elif statement.kind == "directive":
                self._declare(statement.text, statement.scope, label)

    def _declare(self, text: str, scope: int, label: str) -> None:
        if match := re.match(r"\.reg\s*\.(\w+)\s+(.*)$", text, re.S):
            for item in match[2].split(","):
                if many := re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", item):
                    self.registers |= {
                        (scope, f"{many[1]}{i}"): match[1] for i in range(int(many[2]))
                    }
                else:
                    self.registers[scope, item.strip()] = match[1]
        elif text.startswith((".local", ".param")):
            array = declaration(text)
            self.arrays[scope, array.name] = array
        elif text.startswith(".branchtargets"):
            self.tables[label] = operands(text.removeprefix(".branchtargets"))
        elif not text.startswith((".shared", ".pragma", ".callprototype", ".loc")):
            raise self.error(f"the directive '{text}'")

    def error(self, what: str) -> TranslationError:
        """An error that names the line and what to do."""
        text = f"{self.lines.text()}: the emulator does not know {what} (in {self.function.name})"
        head = self.text.split(".")[0]
        if head in ops.NOT_EMULATED:
            return TranslationError(
                f"{text}: {ops.NOT_EMULATED[head]} are not emulated; keep a path without them for "
                "the architecture that the emulator builds (see tests/emu/README.md)"
            )
        return TranslationError(
            f"{text}; add a row to EXPRESSIONS or ACCEPTED in tests/emu/ptx_ops.py, or to "
            "STATEMENTS in ptx_statements.py, its C++ to ptx.h, bits.h, half.h or warp.h, and a "
            "case to conformance/"
        )

    # Operands

    def _scopes(self, scope: int) -> Iterator[int]:
        while True:
            yield scope
            if scope == 0:
                return
            scope = self.parents[scope]

    def register(self, name: str, scope: int) -> str | None:
        """The C++ variable of a register, or None."""
        for s in self._scopes(scope):
            if (s, name) in self.registers:
                return identifier("r_", name) + (f"_{s}" if s else "")
        return None

    def label(self, name: str, scope: int) -> str:
        """The C++ label of a PTX label."""
        for s in self._scopes(scope):
            if (s, name) in self.labels:
                return identifier("l_", name) + (f"_{s}" if s else "")
        raise self.error(f"the label {name}")

    def symbol(self, name: str, scope: int) -> str | None:
        """The address of a variable, parameter or function, or None."""
        for s in self._scopes(scope):
            if (s, name) in self.arrays:
                return f"uint64_t(v_{s}_{identifier('', name)})"
        if name in self.shared.offsets:
            return f"(emu::shared_base + {self.shared.offsets[name]})"
        for i, param in enumerate(self.function.results + self.function.params):
            if param.name == name:
                return f"uint64_t(args[{i}])"
        if any(v.name == name for v in self.module.shared):
            return "emu::dynamic_base"
        if any(v.name == name for v in self.module.variables):
            return f"uint64_t({identifier('g_', name)})"
        if any(f.name == name for f in self.module.functions):
            return f"uint64_t(&{identifier('f_', name)})"
        return None

    def read(self, operand: str, kind: str, scope: int) -> str:
        """A source operand as a C++ expression of the PTX type `kind`."""
        operand, c = operand.strip(), ops.C_TYPES[kind]
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], kind, scope)}"
        if operand.startswith("-") and self.register(operand[1:].strip(), scope):
            return f"negate({self.read(operand[1:], kind, scope)})"
        if register := self.register(operand, scope):
            return f"as<{c}>({register})"
        if operand in ops.SPECIAL:
            return f"as<{c}>({c}({ops.SPECIAL[operand]}))"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"as<{c}>(as<float>(0x{match[1]}u))"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"as<{c}>(as<double>(uint64_t(0x{match[1]}ull)))"
        if re.fullmatch(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", operand):
            number = operand.rstrip("U")
            if kind in ("f32", "f64"):
                return f"{c}({number})"
            if kind in ops.FLOATS:
                return f"as<{c}>(uint{32 if 'x2' in kind else 16}_t({number}))"
            return f"{c}({number}{'ull' if not number.startswith('-') else 'll'})"
        if re.fullmatch(r"[-+]?\d+\.\d*(?:[eE][-+]?\d+)?", operand):
            return f"{c}({operand})"
        if match := re.fullmatch(r"([\w$]+)\s*(?:\+\s*(\d+))?", operand):
            address = self.symbol(match[1], scope)
            if address:
                return f"as<{c}>({address} + {match[2] or 0})"
        raise self.error(f"the operand '{operand}' of '{self.text}'")

    def write(self, register: str, expression: str, kind: str, scope: int) -> str:
        """A C++ statement that puts an expression of the PTX type `kind` into a register."""
        register = register.strip()
        if register == "_":
            return f"(void)({expression});"
        name = self.register(register, scope)
        if name is None:
            raise self.error(f"the destination '{register}' of '{self.text}'")
        return f"put({name}, {ops.C_TYPES[kind]}({expression}));"

    def address(self, operand: str, scope: int) -> str:
        """``[%rd1+8]`` as a C++ expression."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand.strip())
        if not match:
            raise self.error(f"the address '{operand}' of '{self.text}'")
        name, offset = match[1], match[2] or "0"
        if register := self.register(name, scope):
            return f"(uint64_t({register}) + {offset})"
        return f"({self.read(name, 'u64', scope)} + {offset})"

    # Instructions

    def emit(self, i: Instruction) -> str:
        """One instruction in C++."""
        key, rest = self.lookup(i)
        if key in STATEMENTS:
            return STATEMENTS[key](self, i)
        types, template = ops.EXPRESSIONS[key]
        t = i.type
        wide = t[0] + str(2 * int(t[1:])) if t[1:].isdigit() else t
        kinds = [
            {"t": t, "w": wide, "d": i.types[0] if i.types else t}.get(x, x) for x in types.split()
        ]
        if len(kinds) != len(i.operands):
            raise self.error(
                f"{len(i.operands)} operands of '{self.text}' (its row has {len(kinds)})"
            )
        d, sources = (
            i.operands[0],
            [self.read(x, k, i.scope) for x, k in zip(i.operands[1:], kinds[1:], strict=True)],
        )
        if t not in ops.FLOATS:
            rest = []
        if "ftz" in rest:
            sources = [
                f"ftz({x})" if k in ops.FLOATS else x
                for x, k in zip(sources, kinds[1:], strict=True)
            ]
        mode = next((ops.ROUNDING[r] for r in rest if ops.ROUNDING.get(r)), "")
        if "(" in template or "{" in template:
            value = template.format("", *sources)
        elif mode:
            function = f"[](auto... x) {{ return {template}(x...); }}"
            value = f"rounded<{mode}>({', '.join([function, *sources])})"
        else:
            value = f"{template}({', '.join(sources)})"
        for wrapper, function in (("ftz", "ftz"), ("relu", "relu"), ("sat", "saturate")):
            if wrapper in rest:
                value = f"{function}({value})"
        return self.write(d, value, kinds[0], i.scope)

    def lookup(self, i: Instruction) -> tuple[str, list[str]]:
        """The key of the row with the most words of the opcode, and the other modifiers."""
        key, rest, unknown = _row(i.opcode)
        if not key or unknown:
            detail = f" (modifier .{', .'.join(unknown)})" if key else ""
            raise self.error(f"the PTX instruction '{i.opcode}'{detail}")
        return key, rest

    # The function

    def cpp(self) -> str:
        """The whole function."""
        out = [
            f"static void {self.function.cpp}([[maybe_unused]] void** args) {{",
            "  [[maybe_unused]] bool carry = false;",
        ]
        for (scope, name), kind in self.registers.items():
            if kind not in ops.C_TYPES:
                raise self.error(f"the register type .{kind}")
            out.append(f"  {ops.C_TYPES[kind]} {self.register(name, scope)};")
        for (scope, name), array in self.arrays.items():
            c_name = f"v_{scope}_{identifier('', name)}"
            out.append(
                f"  alignas({max(array.align, 8)}) unsigned char {c_name}[{max(array.size, 8)}];"
            )
            out.append(
                f"  memset({c_name}, 0xff, sizeof {c_name});"
            )  # what nobody wrote reads as NaN
        previous = ""
        for s in self.statements:
            if s.kind == "loc":
                self.lines.see(s.text)
            elif s.kind == "label":
                out.append(f"{self.label(s.text, s.scope)}:;")
            elif s.kind == "instruction":
                self.text = s.text
                guard, i = instruction(s.text, s.scope)
                condition = f"if ({self.read(guard, 'pred', s.scope)}) " if guard else ""
                code = f"  {condition}{{ {self.emit(i)} }}"
                directive = self.lines.directive()
                if directive != previous or not out[-1].startswith("  "):
                    out += [directive, code]
                else:  # one line of C++ a line of the kernel, or #line would count on
                    out[-1] += code
                previous = directive
        return "\n".join(out) + "\n}"


@functools.cache
def _row(opcode: str) -> tuple[str, list[str], list[str]]:
    """The best row's key or an empty string, the modifiers left over, and those of them unknown."""
    parts = opcode.split(".")
    best, rest = "", list[str]()
    for key in (*ops.EXPRESSIONS, *STATEMENTS):
        words = key.split(".")
        type_ends = words[-1] not in ops.C_TYPES or words[-1] == parts[-1]
        matches = words[0] == parts[0] and type_ends and not Counter(words) - Counter(parts)
        if matches and len(words) > best.count(".") + bool(best):
            best, rest = key, list((Counter(parts) - Counter(words)).elements())
    types = [p for p in rest if p in ops.C_TYPES]
    rest = [p for p in rest if p not in ops.C_TYPES]
    accepted = set(ops.ACCEPTED.get(parts[0], "").split())
    if best in ops.EXPRESSIONS and parts[-1] in ops.FLOATS:
        accepted |= ops.FLOAT_MODIFIERS
    mixed = types[:-1] if best in ops.EXPRESSIONS else []
    return best, rest, [p for p in rest if p not in accepted] + mixed


def translate(ptx: str, *, root: Path | None = None, toolkit: str = "") -> str:
    """Translate a PTX module.

    Args:
        ptx: the text that ``nvcc -ptx -lineinfo`` wrote.
        root: files below it are named relative to it in errors.
        toolkit: the CUDA include folder; what is inlined from there is reported at its caller.

    Returns:
        The text of a C++ file to be compiled beside ptx.h.

    Raises:
        TranslationError: something that the emulator does not know.
    """
    module = parse(ptx)
    if root is not None:
        module.files = {
            n: os.path.relpath(f, root) if os.path.abspath(f).startswith(f"{root}/") else f
            for n, f in module.files.items()
        }
    toolkit = os.path.normpath(toolkit) if toolkit else ""
    out = ['#include "warp.h"', "namespace ptx {"]  # so that div is not the one of libc
    out += [f"static void {f.cpp}(void** args);" for f in module.functions]
    out += list(_variables(module))
    for function in module.functions:
        shared = layout(module, function)
        out.append(Body(module, function, shared, Lines(module.files, toolkit)).cpp())
        if function.is_kernel:
            ends = ", ".join(f'{{"{name}", {end}}}' for name, end in shared.ends)
            most, exactly = (_threads(function, bound) for bound in ("maxntid", "reqntid"))
            out.append(
                f"static const bool reg_{function.cpp} = emu::add_kernel("
                f'{{"{function.name}", {function.cpp}, '
                f"{shared.size}, {shared.needed}, {{{ends}}}, {most}, {exactly}}});"
            )
    return "\n".join([*out, "}  // namespace ptx\n"])


def _threads(function: Function, bound: str) -> int:
    """The product of a .maxntid or .reqntid; 0: none."""
    match = re.search(rf"\.{bound}\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", function.attributes)
    return int(match[1]) * int(match[2] or 1) * int(match[3] or 1) if match else 0


def _variables(module: Module) -> Iterator[str]:
    """The .global and .const variables; one may hold the address of a later one."""
    addresses = {v.name: f"uint64_t({identifier('g_', v.name)})" for v in module.variables}
    addresses |= {f.name: f"uint64_t(&{f.cpp})" for f in module.functions}
    yield "namespace {"
    for v in module.variables:
        yield f"extern {ops.C_TYPES[v.type]} {identifier('g_', v.name)}[{max(v.count, 1)}];"
    for v in module.variables:
        text = v.initial.strip("{} \n")
        text = re.sub(r"0[fF]([0-9a-fA-F]{8})\b", r"as<float>(0x\1u)", text)
        text = re.sub(r"0[dD]([0-9a-fA-F]{16})\b", r"as<double>(uint64_t(0x\1ull))", text)
        text = re.sub(r"generic\(([\w$]+)\)", r"\1", text)
        text = re.sub(r"[A-Za-z_$][\w$]*", lambda m: addresses.get(m[0], m[0]), text)
        name = identifier("g_", v.name)
        yield f"alignas({v.align}) {ops.C_TYPES[v.type]} {name}[{max(v.count, 1)}] = {{{text}}};"
        yield f'const bool reg_{name} = emu::add_variable("{v.name}", {name}, sizeof {name});'
    yield "}  // namespace"


if __name__ == "__main__":
    print(translate(Path(sys.argv[1]).read_text()))
