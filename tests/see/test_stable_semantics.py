"""Chunk maps equal explicit ones in DAAM's order; builds resume to the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regard.core import State
from regard.errors import InputError
from regard.reach import Call, Handler, Session
from regard.reach.denoising import denoising

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")
pytest.importorskip("datasets", reason="datasets is part of the extra 'data'")

from regard.see.stable_semantics import build as disk
from regard.see.stable_semantics import method as own
from regard.see.stable_semantics import rows as table
from regard.see.stable_semantics import stats as stats
from regard.see.stable_semantics.method import Recipe
from regard.see.stable_semantics.prompts import Prompt, chunks, clean, read_prompts, seed_of
from regard.zoo.tiny_diffusion import tiny_pipeline

CAPTION = "a red zebra and a blue square"  # "zebra" falls into letters
RECIPE = Recipe(images=2, batch=2, steps=2, grid=16, parser="rules", captions=2)
PROMPTS = [Prompt(t, "drawn", "CC0-1.0") for t in (CAPTION, "a red circle", "(a star:1.2)")]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


class Dense(Handler):
    """Every map of the half that the prompt drives: the whole softmax in float64."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        self.grids: dict[int, tuple[int, int]] = {}
        self.steps = 0

    def sites(self, sites: list[Any]) -> list[Any]:
        joint = [s for s in sites if s.kind == "joint"]
        return joint or [s for s in sites if s.kind == "cross"]

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        p = (call.scale * call.q.double() @ call.k.double().transpose(-1, -2)).softmax(-1)
        p = p[place.conditional][:, :, place.image, place.text]
        key = call.site.index
        self.sums[key] = self.sums.get(key, 0) + p
        self.grids[key] = place.grid
        self.steps = place.step + 1


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("average", ["words", "tokens"])
def test_maps_equal_the_explicit_order_of_daam(kind: str, average: str) -> None:
    pipe = tiny_pipeline(kind)
    recipe = Recipe(images=2, steps=2, grid=16, parser="rules", average=average, guidance=4.0)
    seen = Dense()
    parts = chunks(CAPTION, "rules")
    with Session(pipe, [seen]):
        _, maps, chunk = own.draw(pipe, CAPTION, parts, range(2), recipe)
    assert [c.text for c in parts] == ["a red zebra", "a blue square"] and not any(chunk.cut)
    ids = [pipe.tokenizer.decode([i]).strip() for i in pipe.tokenizer(CAPTION).input_ids]
    red, blue = ids.index("red"), ids.index("blue")
    groups = [[[red], list(range(red + 1, ids.index("and")))], [[blue], [ids.index("square")]]]
    if kind == "sd3":  # the same words have columns of T5 too, letters of its own
        third = [pipe.tokenizer_3.decode([i]).strip() for i in pipe.tokenizer_3(CAPTION).input_ids]
        at = third.index("red")
        groups[0][0] += [24 + at]
        groups[0][1] += [24 + n for n in range(at + 1, third.index("and"))]
        groups[1][0] += [24 + third.index("blue")]
        groups[1][1] += [24 + third.index("square")]
    for n, group in enumerate(groups):
        if average == "tokens":
            group = [[c for piece in group for c in piece]]
        total, heads = torch.zeros(2, 16, 16, dtype=torch.double), 0
        for key, p in seen.sums.items():
            column = sum(p[..., piece].mean(-1) for piece in group) / len(group)
            column = column.unflatten(2, seen.grids[key])
            if seen.grids[key] != (16, 16):
                column = F.interpolate(column, (16, 16), mode="bicubic", align_corners=False)
            total += column.clamp_min(0).sum(1) / seen.steps
            heads += column.shape[1]
        assert torch.allclose(maps[:, n].double(), total / heads, atol=1e-6)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_other_pipelines_fill_every_row(kind: str) -> None:
    recipe = Recipe(images=2, steps=1, grid=8, parser="rules")
    made = table.rows(tiny_pipeline(kind), [Prompt("a red circle and a blue square")], recipe)
    assert len(made) == 2 and len({r["seed"] for r in made}) == 2
    assert all(len(r["chunks"]) == 2 and c["map"] for r in made for c in r["chunks"])
    assert made[0]["chunks"][0]["map"] != made[1]["chunks"][0]["map"]


def test_images_are_the_pipelines_own(pipe: Any) -> None:
    images, _, _ = own.draw(pipe, CAPTION, chunks(CAPTION, "rules"), range(2), RECIPE)
    noise = [torch.Generator().manual_seed(seed_of(CAPTION, n)) for n in range(2)]
    plain = pipe([CAPTION] * 2, generator=noise, num_inference_steps=2).images
    assert [i.tobytes() for i in images] == [i.tobytes() for i in plain]


def test_a_chunk_behind_the_limit_has_no_map(pipe: Any) -> None:
    caption = "a red circle and " * 7 + "a blue square"
    made = table.rows(pipe, [Prompt(caption)], Recipe(images=1, steps=1, grid=8, parser="rules"))
    last, first = made[0]["chunks"][-1], made[0]["chunks"][0]
    assert last["cut"] and last["map"] is None and last["x"] is None and last["tokens"] == []
    assert not first["cut"] and len(first["map"]) == 8


def test_every_prompt_of_a_batch_is_read_in_its_own_columns(pipe: Any) -> None:
    """The same characters are other tokens in another prompt; a short prompt lacks them."""
    prompts = ["a red circle and a star", "zz red circle and a star", "a red"]
    spans, recipe = [[(2, 5)], [(6, 12)]], Recipe(grid=16)
    noise = [torch.Generator().manual_seed(n) for n in range(3)]
    seen = own.ChunkMaps(spans, recipe)
    with torch.no_grad(), Session(pipe, [seen]):
        pipe(prompts, generator=noise, num_inference_steps=1, output_type="latent")
    together = seen.maps()
    assert torch.isnan(together[2, 1]).all() and seen.cut == [False, False]
    for n, prompt in enumerate(prompts[:2]):
        alone = own.ChunkMaps(spans, recipe)
        with torch.no_grad(), Session(pipe, [alone]):
            pipe([prompt], generator=[torch.Generator().manual_seed(n)], num_inference_steps=1,
                 output_type="latent")  # fmt: skip
        assert torch.allclose(together[n], alone.maps()[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_second_run_is_not_added_to_the_first(pipe: Any) -> None:
    seen, alone = (own.ChunkMaps([[(6, 12)]], Recipe(grid=16)) for _ in range(2))

    def make(prompt: str) -> None:
        noise = torch.Generator().manual_seed(0)
        pipe(prompt, generator=noise, num_inference_steps=1, output_type="latent")

    with torch.no_grad(), Session(pipe, [seen]):
        make("a red square")
        make("a red circle")
    with torch.no_grad(), Session(pipe, [alone]):
        make("a red circle")
    assert torch.equal(seen.maps(), alone.maps())


def test_the_same_chunk_twice_is_two_spans() -> None:
    found = chunks("a red circle and a red circle", "rules")
    assert [c.start for c in found] == [0, 17]


def test_prompts_are_read_cleaned_and_refused() -> None:
    lines = ['{"prompt": "a (cat:1.2) --ar 1:2", "licence": "CC0"}', "a dog", "a dog", "  "]
    found = read_prompts(lines)
    assert [(clean(p.text), p.licence) for p in found] == [("a cat", "CC0"), ("a dog", "")]
    with pytest.raises(InputError, match="line 1 of the prompts is damaged"):
        read_prompts(['{"text": 3}'])
    with pytest.raises(InputError, match="no prompt"):
        read_prompts(["--v 5"])
    for wrong in ({"images": 0}, {"resize": "x"}, {"average": "x"}, {"parser": "x"}):
        with pytest.raises(InputError):
            Recipe(**wrong)


def marks(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def built(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk.build(pipe, PROMPTS, tmp_path_factory.mktemp("whole"), RECIPE, progress=False)


def test_a_stopped_build_ends_with_the_same_bytes(
    pipe: Any, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = table.draw
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(table, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        disk.build(pipe, PROMPTS, tmp_path, RECIPE, progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "data").glob("*.parquet"))) == 1
    with pytest.raises(InputError, match="holds 1 shards"):
        disk.load(tmp_path)
    before = (tmp_path / "data" / "train-00000-of-00002.parquet").stat().st_mtime_ns
    disk.build(pipe, PROMPTS, tmp_path, RECIPE, progress=False)
    assert (tmp_path / "data" / "train-00000-of-00002.parquet").stat().st_mtime_ns == before
    assert marks(tmp_path) == marks(built)


def test_a_damaged_shard_is_made_again(pipe: Any, built: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    data = copy / "data" / "train-00001-of-00002.parquet"
    data.write_bytes(data.read_bytes()[:-9])
    disk.build(pipe, PROMPTS, copy, RECIPE, progress=False)
    assert marks(copy) == marks(built)


def test_rows_come_back_as_they_were_made(pipe: Any, built: Path) -> None:
    rows = disk.load(built)
    assert len(rows) == 6 and rows[0]["licence"] == "CC0-1.0"
    made = table.rows(pipe, PROMPTS, RECIPE)
    for row, wanted in zip(rows, made):
        assert {k: row[k] for k in ("caption", "seed", "number")} == {
            k: wanted[k] for k in ("caption", "seed", "number")
        }
        for a, b in zip(row["chunks"], wanted["chunks"]):
            assert a["map"] == b["map"] and a["tokens"] == b["tokens"]
            assert a["x"] == pytest.approx(b["x"], rel=1e-6)
    assert rows[4]["prompt"] == "(a star:1.2)" and rows[4]["caption"] == "a star"
    assert rows[0]["image"].size == (32, 32)


def test_the_library_reads_the_folder_by_itself(built: Path, tmp_path: Path) -> None:
    import datasets

    rows = datasets.load_dataset(str(built), split="train", cache_dir=str(tmp_path))
    assert len(rows) == 6 and rows[0]["chunks"][0]["text"] == "a red zebra"


def test_another_builds_folder_is_refused(pipe: Any, built: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="other prompts, settings"):
        disk.build(pipe, PROMPTS[:1], built, RECIPE, progress=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="other data"):
        disk.build(pipe, PROMPTS, tmp_path, RECIPE, progress=False)
    with pytest.raises(InputError, match="holds no build"):
        disk.load(tmp_path)


def test_ray_is_named_where_it_is_missing(tmp_path: Path) -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"regard\[ray\]"):
            disk.build_on_ray("x", PROMPTS, tmp_path, RECIPE, "auto", lambda name: None)


@pytest.mark.slow
def test_ray_writes_the_same_bytes(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is the extra 'ray', which is not part of 'all'")
    disk.build_on_ray("sd", PROMPTS, tmp_path, RECIPE, "local", tiny_pipeline)
    shards = sorted(p.name for p in (built / "data").iterdir())
    assert shards == sorted(p.name for p in (tmp_path / "data").iterdir())
    for name in shards:
        assert (tmp_path / "data" / name).read_bytes() == (built / "data" / name).read_bytes()


def row(caption: str, maps: dict[str, torch.Tensor]) -> dict[str, Any]:
    from PIL import Image

    chunks = [
        {"text": f"a {root}", "root": root, "cut": False, "map": m.tolist(), **own.described(m)}
        for root, m in maps.items()
    ]
    return {"caption": caption, "image": Image.new("RGB", (8, 8)), "chunks": chunks}


def blob(y: int, x: int) -> torch.Tensor:
    made = torch.full((8, 8), 0.01)
    made[y : y + 3, x : x + 3] = 1.0
    return made


def test_statistics_of_known_maps() -> None:
    made = stats.statistics(
        [row("a cat and a dog", {"cat": blob(0, 0), "dog": blob(5, 5)}) for _ in range(2)]
        + [row("a cat", {"cat": blob(0, 5)})]
    )
    assert (made["images"], made["captions"], made["maps"]) == (3, 2, 5)
    assert made["pairs"] == [["cat", "dog", 1]] and list(made["roots"]) == ["cat", "dog"]
    assert made["roots"]["dog"]["x"] > 0.6 and made["roots"]["cat"]["y"] < 0.4
    assert sum(map(sum, made["roots"]["cat"]["cells"])) == 3
    assert made["consistency"]["same chunk"] == pytest.approx(1, abs=1e-5)
    assert made["consistency"]["other chunk"] < 0.5


def test_a_perfect_segmenter_and_an_empty_one() -> None:
    rows = [row("a cat and a dog", {"cat": blob(0, 0), "dog": blob(5, 5)})]
    truth = {"a cat": blob(0, 0) > 0.5, "a dog": blob(5, 5) > 0.5}
    good = stats.score_segmenter(rows, lambda _, texts: torch.stack([truth[t] for t in texts]))
    assert good["iou"][0.5] == 1 and good["chunks"] == 2
    none = stats.score_segmenter(rows, lambda _, texts: torch.zeros(len(texts), 8, 8))
    assert max(none["iou"].values()) == 0
    with pytest.raises(InputError, match="one mask a text"):
        stats.score_segmenter(rows, lambda _, texts: torch.zeros(1, 8, 8))
    parts = [{"label": "cat", "mask": (255 * truth["a cat"]).to(torch.uint8).numpy()}]
    found = stats.score_segmenter(rows, stats.from_pipeline(lambda image: parts), [0.5])
    assert found["iou"][0.5] == 0.5  # the cat, and no dog


def test_captioners_are_told_apart() -> None:
    rows = [row("a cat and a dog", {"cat": blob(0, 0), "dog": blob(5, 5)})]
    good = stats.score_captioner(rows, lambda _: "a cat and a dog", lambda t: torch.ones(len(t), 2))
    assert good == {"bleu": 1.0, "roots": 1.0, "cosine": pytest.approx(1.0)}
    bad = stats.score_captioner(rows, lambda _: "the cat")
    assert bad["roots"] == 0.5 and bad["bleu"] == 0
    assert 0 < stats.bleu(["a cat and a big dog"], ["a cat and a dog"]) < 1
