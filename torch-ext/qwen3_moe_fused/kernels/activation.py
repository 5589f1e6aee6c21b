"""The gate's activation and its derivative in fp32, chosen at compile time by name."""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2(e))), the reciprocal as a square: exp and a division by it would each be checked for the ends
    of their range, which took a seventh of the instructions of ``down_backward`` and of the time to compile it."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu or gelu_tanh of x."""
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    else:  # 0.5 x (1 + tanh(y)) = x sigmoid(2y), y = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative."""
    if ACTIVATION == "silu":
        s = _sigmoid(x)
        activated = x * s
        return activated, s + activated * (1.0 - s)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
