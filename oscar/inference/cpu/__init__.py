"""Hand-written kernels for float32 on a CPU. Without this folder the standard modules compute, several times slower.

Only `oscar.inference.kernels` imports it.
"""

from oscar.inference.cpu.fewer import every_multiplication, use_fewer_multiplications
from oscar.inference.cpu.group_norm import exact_norms
from oscar.inference.cpu.lean import make_lean
from oscar.inference.cpu.reuse import nothing_kept

__all__ = ["every_multiplication", "exact_norms", "make_lean", "nothing_kept", "use_fewer_multiplications"]
