"""Small cartridges and small networks, so that tests of the room stay quick."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # modules for tests stand beside the rooms' folders

from small_cartridges import bright_spot_weights, write_cartridge

__all__ = ["bright_spot_weights", "write_cartridge"]  # fixtures
