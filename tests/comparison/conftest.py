"""Reports without the cost of rendering their pictures."""

import pytest

from hf_dbp.comparison.report.pages import Picture


@pytest.fixture
def sketched(monkeypatch) -> set[str]:
    """Pictures of reports are empty files, but for those whose names are put into this set."""
    whole, rendered = Picture.file, set()
    monkeypatch.setattr(Picture, "file", lambda self, kind: whole(self, kind) if self.name in rendered else b"")
    return rendered
