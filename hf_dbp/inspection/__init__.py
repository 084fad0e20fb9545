"""`hf-dbp inspect`: what a folder of images and masks contains, how it will be used, and a recipe to start from."""

from typing import TYPE_CHECKING

from hf_dbp._moved import moved_names

__all__: list[str] = []

if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
