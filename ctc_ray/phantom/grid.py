"""Frames of a cartridge: grid, serpentine order and global coordinates.

Source: CellSearch archives as the ACCEPT tool reads them: frames are numbered from 1, row by row, every second row from right
to left; archives hold 210 = 6x35, 180 = 5x36, 175 = 5x35, 170 = 5x34, 144 = 4x36 or 140 = 4x35 frames.
"""

from dataclasses import dataclass

from ctc_ray.errors import ConfigError

_CELLSEARCH_GRIDS = {210: (6, 35), 180: (5, 36), 175: (5, 35), 170: (5, 34), 144: (4, 36), 140: (4, 35)}


@dataclass(frozen=True)
class Grid:
    """Rows and columns of frames on a cartridge."""

    num_rows: int
    num_cols: int

    @property
    def num_frames(self) -> int:
        """Frames of the grid."""
        return self.num_rows * self.num_cols

    def place(self, frame: int) -> tuple[int, int]:
        """(row, column) of a frame, both from 0.

        Args:
            frame: 1-based number.

        Raises:
            ConfigError: the grid has no such frame.
        """
        if not 1 <= frame <= self.num_frames:
            raise ConfigError(
                f"frame {frame} is not on a grid of {self.num_rows}x{self.num_cols} frames, numbered from 1"
            )
        row, step = divmod(frame - 1, self.num_cols)
        return row, (step if row % 2 == 0 else self.num_cols - 1 - step)

    def frame_at(self, row: int, col: int) -> int | None:
        """Frame number at (row, column), or None outside the grid."""
        if not (0 <= row < self.num_rows and 0 <= col < self.num_cols):
            return None
        return 1 + row * self.num_cols + (col if row % 2 == 0 else self.num_cols - 1 - col)


def grid_for(num_fields: int) -> Grid:
    """The grid of a cartridge: CellSearch's own for its frame counts, else the squarest one without gaps.

    Args:
        num_fields: frames of the cartridge, at least 1.

    Raises:
        ConfigError: fewer than one field.
    """
    if num_fields < 1:
        raise ConfigError(f"a cartridge needs at least 1 field, not {num_fields}")
    if num_fields in _CELLSEARCH_GRIDS:
        return Grid(*_CELLSEARCH_GRIDS[num_fields])
    rows = max(n for n in range(1, int(num_fields**0.5) + 1) if num_fields % n == 0)
    return Grid(rows, num_fields // rows)
