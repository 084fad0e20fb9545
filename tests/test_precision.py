"""A user of a CPU that is slow in 16 bits is told so."""

import pytest
import torch

from hf_dbp import precision
from hf_dbp.precision import fast_in_16_bits
from hf_dbp.training.arguments import PretrainingArguments


@pytest.mark.parametrize("flag", ["bf16", "fp16", "bf16_full_eval", "fp16_full_eval"])
def test_flags_that_are_slow_on_this_cpu_are_named(tmp_path, monkeypatch, caplog, flag):
    def told(fast, **flags):
        monkeypatch.setattr(precision, "cpu_is_fast", lambda dtype: dtype == fast)
        caplog.clear()
        PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)
        return [message for message in caplog.messages if "20 times" in message]

    own, other = (torch.bfloat16, torch.float16) if flag.startswith("b") else (torch.float16, torch.bfloat16)
    (message,) = told(other, **{flag: True})
    assert message == f"--{flag} can take 20 times as long as float32 on this CPU; give --{flag} false"
    assert not told(own, **{flag: True})
    assert not told(None)


def test_only_cpus_are_asked(monkeypatch):
    monkeypatch.setattr(precision, "cpu_is_fast", lambda dtype: False)
    assert not fast_in_16_bits(torch.device("cpu"))
    assert all(fast_in_16_bits(torch.device(kind)) for kind in ("cuda", "mps", "xpu"))


def test_without_onednn_a_cpu_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision.cpu_is_fast(torch.bfloat16)
