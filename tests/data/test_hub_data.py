"""Data sets of a Hub over real HTTP: open and gated, whole and in part, and what is said when something goes wrong."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from loopback import hub_environment

ROOT = Path(__file__).parents[2]
STREAMED = {"streaming": True, "dataset_name": "me/open"}
GATED = {"streaming": True, "dataset_name": "me/gated"}


@pytest.fixture
def hub(tmp_path, photographs, write) -> Iterator[HubServer]:
    folder = write(tmp_path / "files", "parquet", photographs)
    files: dict[str, bytes | Path] = {f"data/{file.name}": file for file in folder.iterdir()}
    tars = write(tmp_path / "tars", "webdataset", photographs)
    with HubServer() as server:
        server.add("me/open", {"README.md": b"# Photographs\n"} | files)
        server.add("me/gated", {"README.md": b"# Photographs\n"} | files, gated=True)
        server.add("me/tars", {f"{file.name}": file for file in tars.iterdir()})
        server.tokens = {"granted": {"me/gated"}, "stranger": set()}
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    def start(*sources: dict[str, Any], home: str = "home") -> list[dict[str, Any]]:
        """Start a separate process that says what it finds for each source."""
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("hub_client.py"))],
            input=json.dumps(sources),
            env=hub_environment(hub.url, tmp_path / home) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == len(sources), done.stderr[-2000:]
        return found

    return start


@pytest.mark.slow
def test_an_open_and_a_gated_set_streamed_in_part_and_kept(hub, ask, tmp_path):
    part, kept = {"train_fraction": 0.4}, {"cache_dir": str(tmp_path / "c"), "cache_short_side": 48}
    sources = [
        STREAMED,
        STREAMED | part,
        STREAMED | part | kept,
        {"dataset_name": "me/open"} | part,
        STREAMED | part | {"dataset_name": "me/tars"},
        GATED | part | {"token": "granted"},
    ]
    whole, streamed, cached, downloaded, tars, gated = ask(*sources)
    assert (whole["train"], whole["validation"]) == (180, 20)
    assert 50 < streamed["train"] < 95
    assert streamed == cached == downloaded == tars == gated
    before = len(hub.requests)
    assert ask(STREAMED | part | kept)[0] == cached
    files = [path for _, path in hub.requests[before:] if path.endswith(".parquet")]
    assert len(files) <= 10, "what is in the cache is not downloaded again, but for the first image of each list"


@pytest.mark.slow
def test_refusals_name_the_page_to_visit_and_the_remedy(hub, ask):
    page = f"{hub.url}/datasets/me/gated"
    sources = [GATED, GATED | {"token": "stranger"}, GATED | {"token": "wrong"}, STREAMED | {"dataset_name": "me/none"}]
    sources += [source | {"streaming": False} for source in sources]
    expected = [
        "data set me/gated is gated: log in with `hf auth login` (or pass --token), and accept its conditions at "
        f"{page}",
        f"data set me/gated is gated and this account has no access yet: accept its conditions at {page}",
        "the Hub refused the token for me/gated (401): log in again with `hf auth login`, or pass another --token",
        f"no data set me/none on the Hub, or a private one: check the name at {hub.url}/datasets/me/none, and log in "
        "with `hf auth login` if it is private",
    ]
    assert [found["error"] for found in ask(*sources)] == expected * 2


LASTING = {
    403: "the Hub forbids reading {} (403)",
    404: "a file of data set {} is gone (404)",
    429: "the Hub limits the rate of requests for {} (429): wait a few minutes, then run the same command again",
    500: "the Hub fails for {} (500), even after several retries; run the same command again",
    None: "the connection to the Hub broke while reading {}",
}


@pytest.mark.slow
def test_what_passes_is_tried_again_and_what_stays_ends_in_one_line(hub, ask, tmp_path):
    """The third and fourth file fail; once the Hub is back, the same command resumes and fetches only the rest."""
    files = hub.repos["dataset", "me/open"].files
    for status in (429, 503, None):
        hub.add(f"passing/{status}", files)
        hub.fail(rf"passing/{status}/resolve/.*\.parquet", status=status, times=3)
    for status in LASTING:
        hub.add(f"lasting/{status}", files)
        hub.fail(rf"lasting/{status}/resolve/.*train-0000[2-3].*\.parquet", status=status)
    passing = [STREAMED | {"dataset_name": f"passing/{status}"} for status in (429, 503, None)]
    kept = {"cache_dir": str(tmp_path / "c")}
    lasting = [STREAMED | kept | {"dataset_name": f"lasting/{status}"} for status in LASTING]
    found = ask(*passing, *lasting)
    assert [result.get("train") for result in found] == [180] * 3 + [None] * 5
    assert all(fault.times == 0 for fault in hub.faults[:3])
    for (status, message), result in zip(LASTING.items(), found[3:], strict=True):
        assert result["error"].startswith(message.format(f"lasting/{status}")) and "\n" not in result["error"]
    hub.faults.clear()
    assert [result["train"] for result in ask(*lasting)] == [180] * 5


@pytest.mark.slow
def test_a_data_set_is_inspected(hub, tmp_path):
    """It is downloaded as in training; a gated one is refused in the same words."""

    def inspected(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from hf_dbp.cli import main; main()", "inspect", "--dataset_name", name],
            env=hub_environment(hub.url, tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    found = inspected("me/open")
    assert "images     200\n" in found.stdout and "PROBLEM" not in found.stdout, found.stderr[-2000:]
    assert "dataset_name: me/open" in (tmp_path / "outputs/inspection/pretrain.yaml").read_text()
    assert "data set me/gated is gated: log in with `hf auth login`" in inspected("me/gated").stderr
