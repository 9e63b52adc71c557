"""Elements: the number a single code stands for. FP8 in both dialects, FP4, INT8, and the two wide formats beside them.

Terms:
    dialect   how an e4m3 byte is read. `ocp` (float8_e4m3fn): bias 7, ±448, one NaN of either sign. `fnuz`: bias 8,
              ±240, no -0, byte 0x80 is NaN. The same byte is another number: a dialect is part of the type.
    code      what is stored: a byte, or for e2m1 four bits, two to a byte (`pack_e2m1`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

Dialect = Literal["ocp", "fnuz", "none"]

_MANY: Final = 1 << 14  # codes from which a table of all 256 bytes is quicker than conversion one by one
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Element:
    """One number format.

    Attributes:
        name: as in a layout's text.
        bits: of one code. dialect: see the module; `none` where there is one reading only.
        largest: the largest finite magnitude; conversion saturates there.
        storage: torch dtype of a tensor of codes (e2m1: two codes to an int8).
        precision: bits of the significand, the hidden one included: rounding is off by at most 2^-precision of a normal
            value, and by at most half of `smallest` of one below (int8: of any).
        smallest: the least positive magnitude.
    """

    name: str
    bits: int
    dialect: Dialect
    largest: float
    storage: torch.dtype
    precision: int
    smallest: float

    @property
    def packed(self) -> int:
        """Codes in one stored byte."""
        return 2 if self.bits == 4 else 1

    def encode(self, x: Tensor) -> Tensor:
        """Stored codes of float32 x [..., n]: nearest, ties to even, saturating; [..., n / packed] in `storage`.

        NaN stays NaN where the format has one; e2m1 and int8 have none (a layout marks such a block by its scale).
        """
        return _ENCODE.get(self.name, self._cast)(x)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of stored codes, exact.

        Raises:
            ValueError: the codes have another dtype: bytes of one dialect are never read as the other.
        """
        self.check_codes(codes)
        if codes.numel() < _MANY or self.dialect == "none":
            return self._values(codes)
        return self._look_up(codes)

    def check_codes(self, codes: Tensor) -> None:
        """Raise `ValueError` for codes of another dtype: bytes of one dialect are never read as the other."""
        if codes.dtype != self.storage and not (self.packed == 2 and codes.dtype == torch.uint8):
            raise ValueError(f"codes of {self.name} are {_short(self.storage)}, not {_short(codes.dtype)}")

    def _values(self, codes: Tensor) -> Tensor:
        return decode_e2m1(unpack_e2m1(codes)) if self.packed == 2 else codes.float()

    def _look_up(self, codes: Tensor) -> Tensor:
        """As `_values`, from a table of what each byte stands for; two values of a packed byte move as one number."""
        values = self._values(torch.arange(256, dtype=torch.uint8, device=codes.device).view(self.storage))
        table = values.view(torch.int64 if self.packed == 2 else torch.int32)
        found = table.index_select(0, codes.view(torch.uint8).flatten().int()).view(torch.float32)
        return found.view(*codes.shape[:-1], -1) if self.packed == 2 else found.view(codes.shape)

    def _cast(self, x: Tensor) -> Tensor:
        return x.clamp(-self.largest, self.largest).to(self.storage)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- e2m1 --------------------------------------------------------------------------------------------------------------


def encode_e2m1(x: Tensor) -> Tensor:
    """uint8 codes 0 .. 15 of the nearest e2m1 values, ties to the even code, saturating at ±6; bit 3 is the sign."""
    a = x.abs()
    # Bounds are the midpoints between neighbours; a tie belongs to the even code, so >= where the upper code is even.
    code = (a > 0.25).to(torch.uint8)
    for reached in (a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        code += reached
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(code: Tensor) -> Tensor:
    """float32 values of e2m1 codes (uint8, 0 .. 15)."""
    return torch.tensor((*_E2M1, *(-v for v in _E2M1)), device=code.device)[code.long()]


def pack_e2m1(code: Tensor) -> Tensor:
    """int8 [..., n/2] of codes [..., n]: byte j holds column 2j in the low nibble and 2j+1 in the high (spec 3.2).

    Raises:
        ValueError: n is odd.
    """
    if code.shape[-1] % 2:
        raise ValueError(f"{code.shape[-1]} columns cannot be packed in pairs")
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """uint8 codes [..., n] of packed int8 (or uint8) [..., n/2]."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)


def _encode_packed_e2m1(x: Tensor) -> Tensor:
    return pack_e2m1(encode_e2m1(x))


def _encode_int8(x: Tensor) -> Tensor:
    """Symmetric: -128 is not used. NaN becomes 0: the block's scale says that it is none."""
    return x.round().clamp(-127, 127).nan_to_num(0).to(torch.int8)


_ENCODE: Final[dict[str, Callable[[Tensor], Tensor]]] = {"e2m1": _encode_packed_e2m1, "int8": _encode_int8}

# -- the formats -------------------------------------------------------------------------------------------------------

E4M3: Final = Element("e4m3", 8, "ocp", 448.0, torch.float8_e4m3fn, 4, 2.0**-9)
E4M3_FNUZ: Final = Element("e4m3fnuz", 8, "fnuz", 240.0, torch.float8_e4m3fnuz, 4, 2.0**-10)
E5M2: Final = Element("e5m2", 8, "ocp", 57344.0, torch.float8_e5m2, 3, 2.0**-16)
E5M2_FNUZ: Final = Element("e5m2fnuz", 8, "fnuz", 57344.0, torch.float8_e5m2fnuz, 3, 2.0**-17)
E2M1: Final = Element("e2m1", 4, "ocp", 6.0, torch.int8, 2, 0.5)
INT8: Final = Element("int8", 8, "none", 127.0, torch.int8, 7, 1.0)
ELEMENTS: Final = {e.name: e for e in (E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, E2M1, INT8)}
