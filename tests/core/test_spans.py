"""The fused CPU kernel, called block by block, is the truth under every mask."""

from __future__ import annotations

import pytest
import torch

from regard.core import Mask, attend, choose
from regard.core.kernels import reference, spans
from regard.core.patterns import build

from .cases import SHAPES, close, masks, tensors

NAMES = [n for n in masks(1, 40, 40) if n != "none"]


@pytest.mark.parametrize("shape", [s for s, v in SHAPES.items() if v[3] > 1])
@pytest.mark.parametrize("name", NAMES)
def test_equals_true(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "BLOCK_Q", 16)
    monkeypatch.setattr(spans, "BLOCK_K", 8)
    size = SHAPES[shape]
    mask = masks(size[0], size[3], size[4])[name]
    q, k, v = tensors(size)
    out, lse = spans.forward(q, k, v, mask, size[5] ** -0.5)
    true, true_lse = reference.attend(q, k, v, mask, size[5] ** -0.5)
    close(out, true, 2e-6, "out")
    close(lse, true_lse, 2e-6, "lse")


def test_masks_of_their_own_for_rows_and_heads() -> None:
    q, k, v = tensors((2, 4, 2, 40, 40, 16))
    for lead in ((1, 4), (2, 1), (2, 4)):
        mask = Mask.dense(torch.rand(*lead, 40, 40) > 0.5)
        found, true = (attend(q, k, v, mask=mask, kernel=n) for n in ("spans", "reference"))
        close(found.out, true.out, 2e-6, str(lead))


def test_no_key_outside_the_mask_is_read() -> None:
    """NaN beyond the window and in the dropped blocks does not reach the output."""
    q, k, v = tensors((1, 2, 1, 1024, 1024, 16))
    k[:, :, 700:] = v[:, :, 700:] = torch.nan
    out = attend(q[:, :, :512], k, v, mask=Mask.band(None, -300), kernel="spans").out
    rows = torch.arange(512) + 512 - 300  # last key that a query sees
    assert not out[:, :, rows < 640 - 256].isnan().any()
    sparse = build("block_sparse", 1024, block=64, density=0.3)
    kept = sparse.grid(1024, 1024, 64, 64)
    drop = int((kept[0] == 0).nonzero()[0])
    q, k, v = tensors((1, 2, 1, 1024, 1024, 16))
    k[:, :, drop * 64 : drop * 64 + 64] = torch.nan
    assert not attend(q, k, v, mask=sparse).out[:, :, :64].isnan().any()


def test_is_chosen_for_masks_that_skip() -> None:
    q, k, v = tensors((1, 2, 1, 64, 64, 16))
    assert choose(q, k, v, mask=Mask.window(5)) == "spans"
    assert choose(q, k, v, mask=Mask.causal()) == "cpu"
    assert choose(q, k, v, mask=Mask.window(5), softcap=2.0) == "tiled"
    with pytest.raises(ValueError, match="use 'tiled'"):
        attend(q, k, v, softcap=2.0, kernel="spans")


def test_windows_are_not_slowed_by_subnormal_numbers() -> None:
    """A window reads a quarter of what causal attention reads: it cannot take much longer."""
    import time

    q, k, v = tensors((1, 4, 2, 2048, 2048, 64))

    def best(mask: Mask) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            attend(q, k, v, mask=mask, kernel="tiled")
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(Mask.band(256, 0)) < 2.5 * best(Mask.causal())
