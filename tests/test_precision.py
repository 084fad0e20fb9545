"""A user of a CPU that is slow in 16 bits is told so."""

import pytest
import torch

from hf_dbp.downstream.detection.arguments import DetectionArguments
from hf_dbp.precision import fast_in_16_bits
from hf_dbp.training.arguments import PretrainingArguments


@pytest.mark.parametrize("arguments", [PretrainingArguments, DetectionArguments])
@pytest.mark.parametrize(
    ("capability", "flags", "told"),
    [("AVX2", {"bf16": True}, True), ("AVX2", {}, False), ("AVX512", {"bf16": True}, False)],
)
def test_16_bits_on_a_cpu_without_fast_products_are_told(
    tmp_path, monkeypatch, caplog, arguments, capability, flags, told
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    arguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)
    assert sum("--bf16 can take 20 times as long" in message for message in caplog.messages) == told


def test_only_cpus_are_asked(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not fast_in_16_bits(torch.device("cpu"))
    assert all(fast_in_16_bits(torch.device(kind)) for kind in ("cuda", "mps", "xpu"))
