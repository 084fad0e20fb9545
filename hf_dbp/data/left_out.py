"""What is in a source of images but not used: counted and named by reason, for the log, `inspect` and `run.json`.

    images used + images left out = images in the source

Files that hold no images (`.txt`, `.json`, ...) are counted separately; nobody has to act on them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LeftOut"]

logger = logging.getLogger(__name__)

EXAMPLES = 5  # names kept per reason


@dataclass
class LeftOut:
    """The images that are not used.

    Attributes:
        counts: number of images, or of files that may hold some, by reason; a reason ends with what to do, if anything.
        examples: some of their names, by reason.
        other_files: files that hold no images, by suffix.
        notes: how an ambiguous layout was interpreted.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    other_files: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, reason: str, names: Iterable[str], count: int | None = None) -> None:
        """Add images with these names; ``count`` if a name represents several."""
        names = list(names)
        added = len(names) if count is None else count
        if added:
            self.counts[reason] += added
            self.examples[reason] = [*self.examples.get(reason, ()), *names][:EXAMPLES]

    def forget(self, reason: str) -> None:
        """Remove a reason, because its images are used after all."""
        self.counts.pop(reason, None)
        self.examples.pop(reason, None)

    def use(self, reason: str, ending: str, count: int) -> None:
        """Take back ``count`` images whose names end so, because they are used after all."""
        if reason in self.counts:
            self.counts[reason] -= count
            self.examples[reason] = [name for name in self.examples[reason] if not name.endswith(ending)]
            if self.counts[reason] <= 0:
                self.forget(reason)

    def merge(self, other: LeftOut, prefix: str = "") -> None:
        """Add what another source left out, with ``prefix`` before its reasons."""
        for reason, count in other.counts.items():
            self.add(prefix + reason, other.examples[reason], count)
        self.other_files += other.other_files
        self.notes += [note for note in other.notes if note not in self.notes]

    def lines(self) -> list[str]:
        """One line per reason, and the notes."""
        found = [
            f"{n} left out: {reason}" + "".join(f"; e.g. {name}" for name in self.examples[reason][:1])
            for reason, n in self.counts.items()
        ]
        return found + self.notes

    def warn(self, name: str) -> None:
        """Log everything that someone may have to act on."""
        for line in self.lines():
            logger.warning("%s: %s", name, line)

    def record(self) -> dict[str, Any]:
        """As JSON: count, reasons {reason: {count, examples}}, other_files {suffix: count}, notes."""
        reasons = {reason: {"count": n, "examples": self.examples[reason]} for reason, n in self.counts.items()}
        content: dict[str, Any] = {"count": self.counts.total(), "reasons": reasons}
        if self.other_files:
            content["other_files"] = dict(sorted(self.other_files.items()))
        return content | ({"notes": self.notes} if self.notes else {})

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> LeftOut:
        """Rebuild it from the output of `record`."""
        found = cls(other_files=Counter(record.get("other_files", {})), notes=list(record.get("notes", ())))
        for reason, entry in record["reasons"].items():
            found.add(reason, entry["examples"], entry["count"])
        return found
