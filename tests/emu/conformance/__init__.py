"""Every PTX instruction that the emulator knows, against an independent definition; see case.py."""

from tests.emu.conformance import floats, integers, warps

CASES = [*integers.CASES, *floats.CASES, *warps.CASES]
