"""regard build: shards, card, statistics and page; a second run makes nothing anew."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.command import run

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")
pytest.importorskip("datasets", reason="datasets is part of the extra 'data'")

from regard.zoo.tiny_diffusion import tiny_pipeline

BUILD = ("build", "stable-semantics")
SMALL = ("--images-per-prompt", "2", "--steps", "1", "--grid", "8", "--parser", "rules")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sd")
    tiny_pipeline("sd").save_pretrained(path)
    return str(path)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle and a blue square\n<script>alert(1)</script> a star & b\n")
    return str(path)


def test_a_build_and_its_repetition(
    model: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dataset"
    args = (*BUILD, "--model", model, "--prompts", prompts, "--out", str(out), *SMALL)
    code, text, err = run(capsys, *args)
    assert code == 0, err
    assert "2 prompts, 4 images" in err and "no licence" in err
    assert "images: 4" in text
    made = json.loads((out / "statistics.json").read_text())
    assert made["images"] == 4 and made["roots"]["circle"]["count"] == 2
    page = (out / "index.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "attribution" in (out / "README.md").read_text()
    shard = out / "data" / "train-00000-of-00001.parquet"
    before = shard.stat().st_mtime_ns
    assert run(capsys, *args)[0] == 0
    assert shard.stat().st_mtime_ns == before
    assert not list(out.rglob("*.part*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompts", "no/such/file"), "there is no file"),
        (("--parser", "none"), "parser is one of"),
        (("--resize", "none"), "resize is one of"),
    ],
)
def test_errors_come_before_any_work(
    model: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "new"
    code, _, err = run(
        capsys, *BUILD, "--model", model, "--prompts", prompts, "--out", str(out), *SMALL, *more
    )
    assert code == 2 and message in err and not out.exists()
