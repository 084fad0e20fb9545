"""Compare methods: plans (methods x settings x seeds), the runner, paired statistics and the report."""

from typing import TYPE_CHECKING

from hf_dbp._moved import moved_names

__all__: list[str] = []

if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
