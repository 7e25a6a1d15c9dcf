"""Find circulating tumor cells in fluorescence cartridges, and label where it helps most."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ctc-ray")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
