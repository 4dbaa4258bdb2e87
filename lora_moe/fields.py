"""Validators of configuration fields; each returns the normalized value.

Values may come from an untrusted file, so each has an upper bound and messages abbreviate them.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection
from reprlib import repr as brief

import torch

MAX_RANK = 1024  # of one expert
MAX_ROWS = 65_536  # of all experts together: 1 GiB of fp32 for a linear of width 4096
MAX_COEFFICIENT = 1e6  # alpha, balance_coef, z_coef
MAX_PATTERN = 4096  # characters of a regular expression
ADAPTER_DTYPES = ("base", "float32", "bfloat16", "float16", "float64")


def component(name, value, family):
    """A router or middle, or its dict."""
    if isinstance(value, dict):
        value = family.from_dict(value)
    fits = value is None or (isinstance(value, family) and type(value) in family.known.values())
    expect(fits, name, f"None or a registered {family.__name__}", value)
    return value


def expect(condition, name: str, expected: str, received) -> None:
    """Raise ValueError unless the condition holds; the message abbreviates the value."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {brief(received)}")


def fields_of(cls, name: str, fields) -> dict:
    """Check that all keys of `fields` are fields of the dataclass, and return it."""
    expect(isinstance(fields, dict), name, "a dict of fields", fields)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [field for field in fields if field not in known]
    expect(not unknown, name, f"only the fields {sorted(known)}", unknown)
    return fields


def integer(name, value, high):
    """Accepts NumPy integers, but not bool."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    expect(whole and 1 <= value <= high, name, f"an integer in [1, {high}]", value)
    return int(value)


def coefficient(name, value):
    """Compares before converting, which rejects NaN and integers beyond the range of floats."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    expected = f"a number in [0, {MAX_COEFFICIENT:g}]"
    expect(number and 0 <= value <= MAX_COEFFICIENT, name, expected, value)
    return float(value)


def share(name, value, zero=True):
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = number and 0 <= value <= 1 and (zero or value > 0)
    expect(fits, name, f"None or a number in {'[' if zero else '('}0, 1]", value)
    return float(value)


def is_sequence(value):
    """True for lists, tuples, and one-dimensional NumPy arrays and tensors."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1


def _listed(values):
    return values.tolist() if hasattr(values, "tolist") else values


def alphas(alpha, num_experts):
    if not is_sequence(alpha):
        return coefficient("alpha", alpha)
    expect(len(alpha) == num_experts, "alpha", f"a number or {num_experts}, one per expert", alpha)
    return tuple(coefficient(f"alpha[{e}]", a) for e, a in enumerate(_listed(alpha)))


def ranks(r, num_experts):
    if not is_sequence(r):
        r = integer("r", r, MAX_RANK)
        rows = r * num_experts
    else:
        expect(len(r) == num_experts, "r", f"one rank for each of {num_experts} experts", r)
        r = tuple(integer(f"r[{e}]", rank, MAX_RANK) for e, rank in enumerate(_listed(r)))
        rows = sum(r)
    expect(rows <= MAX_ROWS, "r", f"at most {MAX_ROWS} rows for all experts together", rows)
    return r


def dtype_name(dtype):
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    fits = name is None or (isinstance(name, str) and name in ADAPTER_DTYPES)
    expect(fits, "adapter_dtype", f"None or one of {ADAPTER_DTYPES}", dtype)
    return name


def names(name, value):
    """Any collection of names as a tuple; sets are sorted."""
    hint = f"; for one name write ({value!r},)" if isinstance(value, str) else ""
    plain = isinstance(value, Collection) and not isinstance(value, (str, bytes, dict))
    plain = plain and all(isinstance(suffix, str) and suffix for suffix in value)
    expect(plain, name, f"module names{hint}", value)
    ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
    return tuple(map(str, ordered))


def pattern(name, value):
    """Names or a regular expression, not compiled here: that may take seconds if it is from a file."""
    if value is None:
        return ()
    if not isinstance(value, str):
        return names(name, value)
    expect(len(value) <= MAX_PATTERN, name, f"at most {MAX_PATTERN} characters", value)
    return value
