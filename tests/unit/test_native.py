"""Kernels that can't be had are missed with a reason, never with an error."""

import subprocess

import pytest
import torch

from vidgen.ops import attention as attention_module
from vidgen.ops import native
from vidgen.ops.attention import attention


@pytest.fixture(autouse=True)
def fresh():
    for cached in (native._loaded, native.known_dtypes, attention_module._unusable):
        cached.cache_clear()
    yield
    for cached in (native._loaded, native.known_dtypes, attention_module._unusable):
        cached.cache_clear()


def test_switched_off_by_wish(monkeypatch):
    monkeypatch.setenv("VIDGEN_NATIVE", "0")
    assert "VIDGEN_NATIVE=0" in native.why_not()
    assert not native.known_dtypes()
    assert native.kernels(torch.zeros(1)) is None
    q = torch.randn(1, 2, 5, 64)
    assert attention_module.used_backend("auto", q.device, q.dtype) == "sdpa"
    torch.testing.assert_close(attention(q, q, q), attention(q, q, q, backend="reference"))


@pytest.mark.parametrize("flags", [["avx512f"], ["avx2", "fma"]])
def test_without_a_compiler_there_is_a_remedy(monkeypatch, tmp_path, flags):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    assert "install g++" in native.why_not()


@pytest.mark.parametrize("flags", [["sse4_2"], ["avx2"], ["fma"]])
def test_other_processors_are_reported(monkeypatch, flags):
    monkeypatch.setattr(native, "_cpu_flags", lambda: flags)
    assert "neither AVX512 nor AVX2 with FMA" in native.why_not()


@pytest.mark.parametrize("body", ["exit 1", "echo 'x.cpp: error: no such flag' >&2; exit 1"])
def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path, body):
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "_cpu_flags", lambda: ["avx512f"])
    assert "failed" in native.why_not()
    assert not list((tmp_path / "cache" / "vidgen" / "native").iterdir())


def test_a_compiler_that_hangs_is_ended(monkeypatch, tmp_path):
    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_cpu_flags", lambda: ["avx512f"])
    monkeypatch.setattr(native.shutil, "which", lambda _: "g++")
    monkeypatch.setattr(native.subprocess, "run", hang)
    assert "timed out" in native.why_not()
