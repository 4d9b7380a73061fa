"""The PTX instructions that are no plain expression: memory, control, barriers, fragments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.emu import ptx_ops as ops
from tests.emu.ptx_parse import Instruction, identifier, operands

if TYPE_CHECKING:
    from tests.emu.ptx2cpp import Body


def _vector(operand: str) -> list[str]:
    return operands(operand.strip()[1:-1]) if operand.strip().startswith("{") else [operand]


def _check(body: Body, i: Instruction, address: str, kind: str, count: int) -> str:
    if "param" in i.parts or "const" in i.parts:
        return f"const uint64_t at = {address}; "
    space = "_shared" if "shared" in i.parts or "shared::cta" in i.parts else ""
    return f"const uint64_t at = {address}; check{space}<{ops.C_TYPES[kind]}, {count}>(HERE, at); "


def _load(body: Body, i: Instruction) -> str:
    c, targets = ops.C_TYPES[i.type], _vector(i.operands[0])
    text = _check(body, i, body.address(i.operands[1], i.scope), i.type, len(targets))
    atomic = len(targets) == 1 and {"volatile", "relaxed", "acquire"} & set(i.parts)
    for k, target in enumerate(targets):
        value = f"load_atomic<{c}>(at)" if atomic else f"memory<{c}>(at + {k} * sizeof({c}))"
        text += body.write(target, value, i.type, i.scope)
    return text + ("emu::fence();" if "acquire" in i.parts else "")


def _store(body: Body, i: Instruction) -> str:
    c, sources = ops.C_TYPES[i.type], _vector(i.operands[1])
    text = "emu::fence();" if "release" in i.parts else ""
    text += _check(body, i, body.address(i.operands[0], i.scope), i.type, len(sources))
    atomic = len(sources) == 1 and {"volatile", "relaxed", "release"} & set(i.parts)
    for k, source in enumerate(sources):
        value = body.read(source, i.type, i.scope)
        text += (
            f"store_atomic<{c}>(at, {value});"
            if atomic
            else f"memory<{c}>(at + {k} * sizeof({c})) = {value};"
        )
    return text


def _move(body: Body, i: Instruction) -> str:
    d, s, t, scope = i.operands[0], i.operands[1], i.type, i.scope
    if not (s.startswith("{") or d.startswith("{")):
        return body.write(d, body.read(s, t, scope), t, scope)
    bits = f"b{t[1:]}"
    parts = _vector(s if s.startswith("{") else d)
    part = f"b{int(t[1:]) // len(parts)}"
    n, c = int(part[1:]), ops.C_TYPES[bits]
    if s.startswith("{"):
        value = " | ".join(
            f"({c}({body.read(x, part, scope)}) << {n * k})" for k, x in enumerate(parts)
        )
        return body.write(d, value, bits, scope)
    text = f"const {c} x = {body.read(s, bits, scope)};"
    return text + "".join(body.write(x, f"x >> {n * k}", part, scope) for k, x in enumerate(parts))


def _convert(body: Body, i: Instruction) -> str:
    tokens = i.parts[-2:]
    if len(tokens) != 2 or tokens[1] not in ops.C_TYPES:
        raise body.error(f"the PTX instruction '{i.opcode}'")
    to, source = tokens
    mode = next(
        (p for p in i.parts if re.fullmatch(r"r[nzmpa]i?|rna", p)),
        "rz" if to not in ops.FLOATS else "rn",
    )
    sat = "true" if "sat" in i.parts else "false"
    values = [body.read(x, source, i.scope) for x in i.operands[1:]]
    if "ftz" in i.parts:
        values = [f"ftz({v})" for v in values]
    if to == "tf32":
        return body.write(i.operands[0], f"to_tf32<Round::{mode}>({values[0]})", "b32", i.scope)
    c = ops.C_TYPES[to]
    if len(values) == 2:  # cvt.rn.f16x2.f32 d, high, low
        half = ops.C_TYPES[to.removesuffix("x2")]
        high, low = (f"convert<{half}, Round::{mode}, {sat}>({v})" for v in values)
        value = f"{c}{{{low}, {high}}}"
    else:
        value = f"convert<{c}, Round::{mode}, {sat}>({values[0]})"
    if "relu" in i.parts:
        value = f"relu({value})"
    if "ftz" in i.parts and to == "f32":
        value = f"ftz({value})"
    return body.write(i.operands[0], value, to, i.scope)


def _relation(body: Body, relation: str, kind: str, a: str, b: str) -> str:
    if relation in ("num", "nan"):
        return f"{'!' if relation == 'num' else ''}(is_nan({a}) || is_nan({b}))"
    if kind not in ops.FLOATS:
        return f"({a} {ops.COMPARE[relation]} {b})"
    # unordered relations hold for NaN: each is the negation of the opposite ordered one
    negated = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "neu": "eq"}
    if relation in negated:
        return f"!{_relation(body, negated[relation], kind, a, b)}"
    if relation == "ne":
        return f"({a} < {b} || {a} > {b})"
    return f"({a} {ops.COMPARE[relation]} {b})"


def _comparison(body: Body, i: Instruction, kind: str) -> tuple[str, str]:
    """The relation of operands 1 and 2, and of their upper halves for a pair."""
    words = [p for p in i.parts[1:] if p not in ops.C_TYPES and p != "ftz"]
    a, b = (body.read(x, kind, i.scope) for x in i.operands[1:3])
    if "ftz" in i.parts:
        a, b = f"ftz({a})", f"ftz({b})"
    if kind.endswith("x2"):
        half = kind.removesuffix("x2")
        both = [
            _relation(body, words[0], half, f"{a}.{part}", f"{b}.{part}")
            for part in ("low", "high")
        ]
    else:
        both = [_relation(body, words[0], kind, a, b)] * 2
    if len(words) > 1:
        sign = {"and": "&&", "or": "||", "xor": "!="}[words[1]]
        c = body.read(i.operands[3], "pred", i.scope)
        both = [f"({r} {sign} {c})" for r in both]
    return both[0], both[1]


def _compare(body: Body, i: Instruction) -> str:
    d, _, second = i.operands[0].partition("|")
    low, high = _comparison(body, i, i.type)
    if not second:
        return body.write(d, low, "pred", i.scope)
    if not i.type.endswith("x2"):
        high = f"!{low}"
    text = f"const bool x = {low}, y = {high};"
    return text + body.write(d, "x", "pred", i.scope) + body.write(second, "y", "pred", i.scope)


def _compare_to_number(body: Body, i: Instruction) -> str:
    to, kind = i.types
    low, high = _comparison(body, i, kind)
    c = ops.C_TYPES[to]
    if to.endswith("x2"):
        half = ops.C_TYPES[to.removesuffix("x2")]
        value = f"{c}{{truth<{half}>({low}), truth<{half}>({high})}}"
    elif kind.endswith("x2"):
        value = f"{c}(({low} ? 0xffffu : 0u) | ({high} ? 0xffff0000u : 0u))"
    else:
        value = f"truth<{c}>({low})"
    return body.write(i.operands[0], value, to, i.scope)


def _shuffle(body: Body, i: Instruction) -> str:
    d, _, p = i.operands[0].partition("|")
    kind = next(k for k in ("up", "down", "bfly", "idx") if k in i.parts)
    value, *rest = (
        body.read(x, k, i.scope)
        for x, k in zip(i.operands[1:], ("b32", "u32", "u32", "u32"), strict=True)
    )
    arguments = ", ".join(["HERE", value, *rest, "ok"])
    call = f"bool ok; const uint32_t x = shuffle<Shuffle::{kind}>({arguments});"
    return (
        call
        + body.write(d, "x", "b32", i.scope)
        + (body.write(p, "ok", "pred", i.scope) if p else "")
    )


def _match_all(body: Body, i: Instruction) -> str:
    d, _, p = i.operands[0].partition("|")
    value, mask = (
        body.read(i.operands[1], i.type, i.scope),
        body.read(i.operands[2], "u32", i.scope),
    )
    text = f"const uint32_t x = match_all(HERE, {value}, {mask});" + body.write(
        d, "x", "b32", i.scope
    )
    return text + (body.write(p, "x != 0", "pred", i.scope) if p else "")


def _elect(body: Body, i: Instruction) -> str:
    d, _, p = i.operands[0].partition("|")
    text = f"const uint32_t x = __builtin_ctz({body.read(i.operands[1], 'u32', i.scope)});"
    return (
        text
        + body.write(d, "x", "b32", i.scope)
        + (body.write(p, "x == emu::lane()", "pred", i.scope) if p else "")
    )


def _atomic(body: Body, i: Instruction) -> str:
    d, place, *sources = i.operands
    c = ops.C_TYPES[i.type]
    operation = next((p for p in i.parts if p in ops.ATOMIC), "")
    if not operation or "v2" in i.parts or "v4" in i.parts or "v8" in i.parts:
        raise body.error(f"the PTX instruction '{i.opcode}'")
    values = [body.read(x, i.type, i.scope) for x in sources]
    order = "emu::fence();" if {"acquire", "release", "acq_rel"} & set(i.parts) else ""
    call = (
        f"atomic<{c}>(at, [&]({c} was) {{ return {c}({ops.ATOMIC[operation].format(*values)}); }})"
    )
    check = _check(body, i, body.address(place, i.scope), i.type, 1)
    return (
        order
        + check
        + f"const {c} was_there = {call};"
        + order
        + body.write(d, "was_there", i.type, i.scope)
    )


def _reduction(body: Body, i: Instruction) -> str:
    return _atomic(body, Instruction(i.opcode, ["_", *i.operands], i.scope))


def _carry(body: Body, i: Instruction) -> str:
    a, b = (body.read(x, i.type, i.scope) for x in i.operands[1:])
    into = "carry" if i.parts[0] in ("addc", "subc") else "false"
    function = "add_carry" if i.parts[0].startswith("add") else "sub_borrow"
    keep = "carry = next;" if "cc" in i.parts else ""
    return f"bool next; const auto x = {function}({a}, {b}, {into}, next);{keep}" + body.write(
        i.operands[0], "x", i.type, i.scope
    )


def _carry_mad(body: Body, i: Instruction) -> str:
    a, b, c = (body.read(x, i.type, i.scope) for x in i.operands[1:])
    product = f"{'mul_hi' if 'hi' in i.parts else 'mul'}({a}, {b})"
    into = "carry" if i.parts[0] == "madc" else "false"
    keep = "carry = next;" if "cc" in i.parts else ""
    return f"bool next; const auto x = add_carry({product}, {c}, {into}, next);{keep}" + body.write(
        i.operands[0], "x", i.type, i.scope
    )


def _barrier(body: Body, i: Instruction) -> str:
    if "red" in i.parts:
        d, name, *rest = i.operands
        threads, vote = (rest[0] if len(rest) == 2 else "0"), rest[-1]
        kind = next(k for k in ("popc", "and", "or") if k in i.parts)
        name, threads, vote = (
            body.read(x, k, i.scope) for x, k in ((name, "u32"), (threads, "u32"), (vote, "pred"))
        )
        call = f"const emu::Votes x = emu::sync_block(HERE, {name}, {threads}, {vote});"
        value = {"popc": "x.yes", "and": "x.yes == x.all", "or": "x.yes != 0"}[kind]
        return call + body.write(d, value, "u32" if kind == "popc" else "pred", i.scope)
    values = [body.read(x, "u32", i.scope) for x in i.operands]
    function = "arrive_block" if "arrive" in i.parts else "sync_block"
    return f"emu::{function}({', '.join(['HERE', *values])});"


def _warp_barrier(body: Body, i: Instruction) -> str:
    return f"emu::sync_warp(HERE, {body.read(i.operands[0], 'u32', i.scope)});"


def _mma(body: Body, i: Instruction) -> str:
    shape = next((p for p in i.parts if p.startswith("m16")), "")
    row = ops.MMA.get(f"{shape} {' '.join(i.parts[-4:])}")
    if row is None or "row" not in i.parts or "col" not in i.parts:
        raise body.error(f"the PTX instruction '{i.opcode}' (table MMA)")
    element, a_count, b_count = row
    d, a, b, c = (_vector(x) for x in i.operands)
    text = f"float d[4] = {{{', '.join(body.read(x, 'f32', i.scope) for x in c)}}};"
    for name, regs, count in (("a", a, a_count), ("b", b, b_count)):
        if len(regs) != count:
            raise body.error(
                f"{len(regs)} registers of {name.upper()} in '{body.text}' (its row has {count})"
            )
        values = ", ".join(body.read(x, "b32", i.scope) for x in regs)
        text += f"const uint32_t {name}[{count}] = {{{values}}};"
    text += f"mma<{element}>(HERE, d, a, b);"
    return text + "".join(body.write(x, f"d[{k}]", "f32", i.scope) for k, x in enumerate(d))


def _load_matrix(body: Body, i: Instruction) -> str:
    d = _vector(i.operands[0])
    trans = "true" if "trans" in i.parts else "false"
    address = body.address(i.operands[1], i.scope)
    text = f"uint32_t d[{len(d)}]; load_matrix<{trans}>(HERE, {address}, d);"
    return text + "".join(body.write(x, f"d[{k}]", "b32", i.scope) for k, x in enumerate(d))


def _copy_async(body: Body, i: Instruction) -> str:
    place, source, size, *rest = i.operands
    to, of = body.address(place, i.scope), body.address(source, i.scope)
    taken = body.read(rest[0], "u32", i.scope) if rest else size
    if (
        rest
        and body.register(rest[0], i.scope)
        and body.registers.get((i.scope, rest[0])) == "pred"
    ):
        taken = f"({body.read(rest[0], 'pred', i.scope)} ? 0u : {size}u)"  # ignore-src
    return f"emu::copy_async(HERE, {to}, {of}, {size}, {taken});"


def _copy_commit(body: Body, i: Instruction) -> str:
    return "emu::copy_commit();"


def _copy_wait(body: Body, i: Instruction) -> str:
    return (
        f"emu::copy_wait({i.operands[0]});"
        if i.operands
        else "emu::copy_commit(); emu::copy_wait(0);"
    )


def _branch(body: Body, i: Instruction) -> str:
    return f"goto {body.label(i.operands[0], i.scope)};"


def _branch_table(body: Body, i: Instruction) -> str:
    cases = "".join(
        f"case {k}: goto {body.label(x, i.scope)};"
        for k, x in enumerate(body.tables[i.operands[1]])
    )
    index = body.read(i.operands[0], "u32", i.scope)
    outside = 'default: emu::fail(HERE, "jump outside its table");'
    return f"switch ({index}) {{{cases} {outside}}}"


def _call(body: Body, i: Instruction) -> str:
    text = ", ".join(i.operands)
    match = re.match(r"(?:\(([^)]*)\)\s*,\s*)?([%\w$]+)\s*(?:,\s*\(([^)]*)\))?", text)
    if not match:
        raise body.error(f"the call '{text}'")
    results, name, params = operands(match[1] or ""), match[2], operands(match[3] or "")
    passed = "".join(
        f"reinterpret_cast<void*>({body.symbol(x, i.scope)}), " for x in results + params
    )
    known = {"vprintf": "emu::print", "__assertfail": "emu::assert_failed"}
    if body.register(name, i.scope):
        target = f"reinterpret_cast<void (*)(void**)>({body.read(name, 'u64', i.scope)})(passed)"
    elif name in known:
        target = f"{known[name]}(HERE, passed)"
    elif any(f.name == name for f in body.module.functions):
        target = f"{identifier('f_', name)}(passed)"
    else:
        raise body.error(f"the function '{name}', which is not in this translation unit")
    return f"void* passed[] = {{{passed}nullptr}}; {target};"


def _leave(body: Body, i: Instruction) -> str:
    return "return;" if i.parts[0] == "ret" or body.function.is_kernel else "emu::exit_thread();"


def _trap(body: Body, i: Instruction) -> str:
    return 'emu::fail(HERE, "trap");'


def _fence(body: Body, i: Instruction) -> str:
    return "emu::fence();"


def _nothing(body: Body, i: Instruction) -> str:
    return ";"


def _unknown(body: Body, i: Instruction) -> str:
    raise body.error(f"the PTX instruction '{i.opcode}'")


# opcode -> the function that writes its C++; ACCEPTED of ptx_ops.py holds the further modifiers.
STATEMENTS: dict[str, Callable[[Body, Instruction], str]] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "mov": _move,
    "cvt": _convert,
    "cvt.pack": _unknown,
    "setp": _compare,
    "set": _compare_to_number,
    "shfl.sync": _shuffle,
    "match.all.sync": _match_all,
    "elect.sync": _elect,
    "atom": _atomic,
    "red": _reduction,
    "add.cc": _carry,
    "addc": _carry,
    "sub.cc": _carry,
    "subc": _carry,
    "mad.lo.cc": _carry_mad,
    "mad.hi.cc": _carry_mad,
    "madc.lo": _carry_mad,
    "madc.hi": _carry_mad,
    "bar.sync": _barrier,
    "bar.arrive": _barrier,
    "bar.red": _barrier,
    "barrier.sync": _barrier,
    "barrier.arrive": _barrier,
    "barrier.red": _barrier,
    "bar.warp.sync": _warp_barrier,
    "mma.sync": _mma,
    "ldmatrix.sync": _load_matrix,
    "cp.async": _copy_async,
    "cp.async.commit_group": _copy_commit,
    "cp.async.wait_group": _copy_wait,
    "cp.async.wait_all": _copy_wait,
    "cp.async.mbarrier": _unknown,
    "cp.async.bulk": _unknown,
    "bra": _branch,
    "brx.idx": _branch_table,
    "call": _call,
    "ret": _leave,
    "exit": _leave,
    "trap": _trap,
    "brkpt": _trap,
    "membar": _fence,
    "fence": _fence,
    "fence.proxy": _unknown,
    "prefetch": _nothing,
    "prefetchu": _nothing,
    "nanosleep": _nothing,
    "griddepcontrol": _nothing,
    "pmevent": _nothing,
    "discard": _nothing,
    "applypriority": _nothing,
}
