"""What a row may attend to: the mask of a variant, how it is read off a tensor, and texts packed into one row."""

from .mask import Mask, Packed, Room, Tile
from .packing import unpack_rows
from .parsing import find_segments, from_segments, parse, split, values_are_hidden
from .rotation import Rotation

__all__ = [
    "Mask",
    "Packed",
    "Room",
    "Rotation",
    "Tile",
    "find_segments",
    "from_segments",
    "parse",
    "split",
    "unpack_rows",
    "values_are_hidden",
]
