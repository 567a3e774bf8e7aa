"""The native module's functions (`_pixels.c`); absent where it was not built."""

import numpy as np
import numpy.typing as npt

from vitscale.pixels import ImageBytes

LIBJPEG_TURBO: str

def resize(
    out: npt.NDArray[np.uint8],
    pixels: npt.NDArray[np.uint8],
    region: tuple[int, int, int, int],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    at: tuple[int, int],
    cubic: bool,
    mirrored: bool,
    rows_first: bool,
    /,
) -> None: ...
def decode_resize(
    out: npt.NDArray[np.uint8],
    data: ImageBytes,
    width: int,
    height: int,
    denominator: int,
    region: tuple[int, int, int, int],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    at: tuple[int, int],
    cubic: bool,
    mirrored: bool,
    rows_first: bool,
    /,
) -> bool: ...
def avx2(wanted: bool, /) -> bool: ...
