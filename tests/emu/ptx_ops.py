"""The PTX instructions that the emulator knows, one table row each.

A row of `EXPRESSIONS` is ``opcode: (types, C++)``. `opcode` may leave modifiers out: the row with
the most matching words wins (a type must end the opcode), and a modifier that no row and no rule
accepts is an error, never ignored. `types` are the types of the destination and of each source:
``t`` the instruction's own type (its last one), ``d`` its first one, ``w`` the last at twice the
width, anything else literally. `C++` is a function of ptx.h, bits.h, half.h or warp.h that is
called with the sources or, if it holds a parenthesis or brace, a template over them.

The instructions that are no plain expression are the table `STATEMENTS` of ptx_statements.py.
"""

from __future__ import annotations

C_TYPES = {"pred": "bool", "f32": "float", "f64": "double"}
C_TYPES |= {
    f"{k}{n}": f"{c}{n}_t"
    for n in (8, 16, 32, 64)
    for k, c in zip("bus", ("uint", "uint", "int"), strict=True)
}
C_TYPES |= {"f16": "f16", "bf16": "bf16", "f16x2": "pair<f16>", "bf16x2": "pair<bf16>"}
FLOATS = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}

SPECIAL = {"%laneid": "emu::lane()", "WARP_SZ": "32u", "%warpid": "(emu::thread_id() / 32u)"}
SPECIAL |= {"%nwarpid": "((emu::block_size() + 31u) / 32u)", "%smid": "0u", "%nsmid": "1u"}
SPECIAL |= {
    f"%{ptx}.{axis}": f"{cuda}.{axis}"
    for ptx, cuda in (
        ("tid", "emu::threadIdx"),
        ("ntid", "emu::blockDim"),
        ("ctaid", "emu::blockIdx"),
        ("nctaid", "emu::gridDim"),
    )
    for axis in "xyz"
}
SPECIAL |= {f"%lanemask_{r}": f"lane_mask_{r}()" for r in ("eq", "lt", "le", "gt", "ge")}
SPECIAL |= {"%clock": "emu::clock()", "%clock64": "emu::clock()", "%globaltimer": "emu::clock()"}
SPECIAL |= {"%clock_hi": "(emu::clock() >> 32)"}
SPECIAL |= {"%dynamic_smem_size": "emu::dynamic_size()", "%gridid": "0u"}

# The rounding modes that change the value of floating-point arithmetic; .rn is what C++ does.
ROUNDING = {"rn": "", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}

T = "t t"
EXPRESSIONS: dict[str, tuple[str, str]] = {
    # arithmetic: integers, floats, halves and pairs of halves through overloads
    "add": ("t t t", "add"),
    "sub": ("t t t", "sub"),
    "mul": ("t t t", "mul"),
    "mul.lo": ("t t t", "mul"),
    "mul.hi": ("t t t", "mul_hi"),
    "mul.wide": ("w t t", "mul_wide"),
    "mul24.lo": ("t t t", "mul24"),
    "mad": ("t t t t", "fma"),  # mad.f32 is fma.rn.f32 on every supported architecture
    "mad.lo": ("t t t t", "add(mul({1}, {2}), {3})"),
    "mad.hi": ("t t t t", "add(mul_hi({1}, {2}), {3})"),
    "mad.wide": ("w t t w", "add(mul_wide({1}, {2}), {3})"),
    "mad24.lo": ("t t t t", "add(mul24({1}, {2}), {3})"),
    "fma": ("t t t t", "fma"),
    "div": ("t t t", "div"),
    "rem": ("t t t", "rem"),
    "min": ("t t t", "minimum<false>"),
    "max": ("t t t", "maximum<false>"),
    "min.NaN": ("t t t", "minimum<true>"),
    "max.NaN": ("t t t", "maximum<true>"),
    "abs": (T, "absolute"),
    "neg": (T, "negate"),
    "copysign": ("t t t", "std::copysign({2}, {1})"),
    "sad": ("t t t t", "sad"),
    "dp4a.u32.u32": ("u32 b32 b32 u32", "dp4a<uint8_t, uint8_t>"),
    "dp4a.s32.s32": ("s32 b32 b32 s32", "dp4a<int8_t, int8_t>"),
    # functions: the hardware's are approximate, these are exact to rounding
    "sqrt": (T, "square_root"),
    "rsqrt": (T, "reciprocal_root"),
    "rcp": (T, "reciprocal"),
    "ex2": (T, "exp2_of"),
    "lg2": (T, "std::log2"),
    "sin": (T, "std::sin"),
    "cos": (T, "std::cos"),
    "tanh": (T, "tanh_of"),
    # bits
    "and": ("t t t", "bit_and"),
    "or": ("t t t", "bit_or"),
    "xor": ("t t t", "bit_xor"),
    "not": (T, "bit_not"),
    "cnot": (T, "({1}) == 0"),
    "lop3": ("t t t t u32", "lop3"),
    "shl": ("t t u32", "shl"),
    "shr": ("t t u32", "shr"),
    "shf.l.wrap": ("b32 b32 b32 u32", "funnel_left({1}, {2}, {3} & 31)"),
    "shf.l.clamp": ("b32 b32 b32 u32", "funnel_left({1}, {2}, std::min({3}, 32u))"),
    "shf.r.wrap": ("b32 b32 b32 u32", "funnel_right({1}, {2}, {3} & 31)"),
    "shf.r.clamp": ("b32 b32 b32 u32", "funnel_right({1}, {2}, std::min({3}, 32u))"),
    "popc": ("u32 t", "__builtin_popcountll({1})"),
    "clz": ("u32 t", "leading_zeros"),
    "bfind": ("u32 t", "find_leading<false>"),
    "bfind.shiftamt": ("u32 t", "find_leading<true>"),
    "brev": (T, "reverse_bits"),
    "bfe": ("t t u32 u32", "extract_bits"),
    "bfi": ("t t t u32 u32", "insert_bits"),
    "fns": ("b32 b32 u32 s32", "find_nth_set"),
    "prmt": ("b32 b32 b32 b32", "permute"),
    "selp": ("t t t pred", "{3} ? {1} : {2}"),
    "slct.f32": ("d d d f32", "{3} >= 0 ? {1} : {2}"),
    "slct.s32": ("d d d s32", "{3} >= 0 ? {1} : {2}"),
    "testp.finite": ("pred t", "std::isfinite({1})"),
    "testp.infinite": ("pred t", "std::isinf({1})"),
    "testp.number": ("pred t", "!std::isnan({1})"),
    "testp.notanumber": ("pred t", "std::isnan({1})"),
    "testp.normal": ("pred t", "std::isnormal({1})"),
    "testp.subnormal": ("pred t", "std::fpclassify({1}) == FP_SUBNORMAL"),
    # the warp
    "vote.sync.ballot": ("b32 pred u32", "ballot(HERE, {1}, {2})"),
    "vote.sync.any": ("pred pred u32", "ballot(HERE, {1}, {2}) != 0"),
    "vote.sync.all": ("pred pred u32", "ballot(HERE, !({1}), {2}) == 0"),
    "vote.sync.uni": ("pred pred u32", "vote_uniform(HERE, {1}, {2})"),
    "match.any.sync": ("b32 t u32", "match_any(HERE, {1}, {2})"),
    "redux.sync.add": (
        "t t u32",
        "reduce(HERE, {1}, {2}, [](auto x, auto y) {{ return add(x, y); }})",
    ),
    "redux.sync.min": (
        "t t u32",
        "reduce(HERE, {1}, {2}, [](auto x, auto y) {{ return std::min(x, y); }})",
    ),
    "redux.sync.max": (
        "t t u32",
        "reduce(HERE, {1}, {2}, [](auto x, auto y) {{ return std::max(x, y); }})",
    ),
    "redux.sync.and": ("t t u32", "reduce(HERE, {1}, {2}, [](auto x, auto y) {{ return x & y; }})"),
    "redux.sync.or": ("t t u32", "reduce(HERE, {1}, {2}, [](auto x, auto y) {{ return x | y; }})"),
    "redux.sync.xor": ("t t u32", "reduce(HERE, {1}, {2}, [](auto x, auto y) {{ return x ^ y; }})"),
    # Lanes run one at a time here, and no program may assume more: a lane is active alone.
    "activemask": ("b32", "lane_mask_eq()"),
    # addresses: shared memory lies below 4 GiB, so one number serves every state space
    "cvta": (T, "{1}"),
    "isspacep.shared": ("pred u64", "emu::is_shared({1})"),
    "isspacep.shared::cta": ("pred u64", "emu::is_shared({1})"),
    "isspacep.global": ("pred u64", "!emu::is_shared({1})"),
}

# Modifiers that an opcode may carry besides its row's own words and its types. Most have no effect
# here (scopes, cache hints, alignment promises); the rest are read by the statement's function.
_MEMORY = (
    "global local const param shared shared::cta weak relaxed volatile acquire release acq_rel "
    "cta gpu sys ca cg cs lu cv nc wb wt v2 v4 v8 noftz "
    "L1::evict_normal L1::evict_first L1::evict_last L1::evict_unchanged L1::no_allocate "
    "L2::64B L2::128B L2::256B L2::evict_last L2::evict_first L2::evict_normal"
)
_RELATIONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"
ACCEPTED = {
    "ld": _MEMORY,
    "ldu": _MEMORY,
    "st": _MEMORY,
    "atom": _MEMORY + " add min max and or xor exch cas inc dec",
    "red": _MEMORY + " add min max and or xor inc dec",
    "cvt": "rn rz rm rp rna rni rzi rmi rpi ftz sat relu tf32",
    "cvta": "to global local const shared shared::cta param",
    "setp": _RELATIONS,
    "set": _RELATIONS,
    "shfl": "up down bfly idx b32",
    "bra": "uni",
    "call": "uni",
    "ret": "uni",
    "brx": "uni",
    "div": "full",
    "cp": "global shared shared::cta ca cg L2::64B L2::128B L2::256B",
    "bar": "cta aligned popc and or",
    "barrier": "cta aligned popc and or",
    "membar": "cta gl sys",
    "fence": "acq_rel sc acquire release cta gpu sys",
    "addc": "cc",
    "subc": "cc",
    "madc": "cc",
    "prefetch": "global local L1 L2 L2::evict_last L2::evict_normal",
    "prefetchu": "L1",
    "griddepcontrol": "launch_dependents wait",
    "discard": "global L2",
    "applypriority": "global L2::evict_normal",
    "mma": "aligned m16n8k4 m16n8k8 m16n8k16 row col tf32",
    "ldmatrix": "aligned m8n8 x1 x2 x4 trans shared shared::cta",
}
# For floats: .approx promises less than the functions here give, the others wrap the result.
FLOAT_MODIFIERS = {"approx", "ftz", "sat", "relu", *ROUNDING}

COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip

ATOMIC = {
    "add": "add(was, {0})",
    "min": "minimum<false>(was, {0})",
    "max": "maximum<false>(was, {0})",
    "and": "bit_and(was, {0})",
    "or": "bit_or(was, {0})",
    "xor": "bit_xor(was, {0})",
    "exch": "{0}",
    "cas": "was == {0} ? {1} : was",
    "inc": "was >= {0} ? 0u : was + 1u",
    "dec": "was == 0u || was > {0} ? {0} : was - 1u",
}

# mma.sync: shape and operand types -> (element, registers of A, registers of B)
MMA = {
    "m16n8k4 f32 tf32 tf32 f32": ("tf32", 2, 1),
    "m16n8k8 f32 tf32 tf32 f32": ("tf32", 4, 2),
    "m16n8k8 f32 f16 f16 f32": ("f16", 2, 1),
    "m16n8k16 f32 f16 f16 f32": ("f16", 4, 2),
    "m16n8k8 f32 bf16 bf16 f32": ("bf16", 2, 1),
    "m16n8k16 f32 bf16 bf16 f32": ("bf16", 4, 2),
}

# What hardware beyond the emulator is named in the error for these.
NOT_EMULATED = {
    "wgmma": "warpgroup matrix instructions",
    "tcgen05": "tensor memory",
    "mbarrier": "mbarriers",
    "cp": "bulk copies (TMA) and mbarriers",
    "fence": "proxies",
    "mapa": "clusters",
    "getctarank": "clusters",
    "barrier": "cluster barriers",
    "multimem": "multimem",
    "setmaxnreg": "warp specialisation",
    "tensormap": "TMA descriptors",
    "tex": "textures",
    "suld": "surfaces",
    "wmma": "wmma (use mma.sync)",
    "alloca": "dynamic stack allocation",
}
