"""bench kernels: every outcome is told apart, a run goes on where it stopped, numbers are right."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.cli import main
from regard.core import attend, patterns
from regard.errors import InputError
from regard.lab.bench import kernels as bench
from regard.lab.bench import kernels_page, kernels_verdicts, patterns_page, record, timer
from regard.lab.bench.cases import Case, masks, pointwise
from regard.lab.bench.kernel import BLOCK, Kernel, flex_mask
from regard.lab.bench.registry import chosen, kernels, load, why_not

SMALL: dict[str, Any] = {"lengths": [48], "heads": (4, 2), "dim": 16, "rounds": 1,
                         "progress": None}  # fmt: skip


def kernel(fn: Callable[..., Any], name: str = "own", **more: Any) -> Kernel:
    return Kernel(
        name, "user", "a test", lambda case: lambda q, k, v: fn(q, k, v, case.mask), **more
    )


@pytest.fixture(scope="module")
def small() -> record.Result:
    return bench.run(masks="all", kernels="attend,tiled,naive,sdpa,flash-attn-2,sdpa-cudnn",
                     backward=True, **SMALL)  # fmt: skip


def test_every_supported_cell_is_exact(small: record.Result) -> None:
    measured = [c for c in kernels_verdicts.cells(small) if c.ok]
    assert {c.settings["mask"] for c in measured} == set(patterns.PATTERNS)
    assert len(measured) == 14 * 2 * 4
    assert all(c.values["exact"] and c.values["error"] < 1e-4 for c in measured)


def test_flops_count_allowed_pairs_only(small: record.Result) -> None:
    for cell in kernels_verdicts.cells(small):
        if cell.ok:
            s = cell.settings
            mask = patterns.build(s["mask"], 48, **s["parameters"])
            pairs = int(mask.cells(48, 48).sum())
            factor = 2.5 if s["backward"] else 1.0
            assert cell.values["flops"] == 4 * pairs * 4 * 16 * factor


def test_nothing_is_dropped(small: record.Result) -> None:
    assert len(small.cells) == 1 + 6 * 14 * 2
    ends = {c.outcome for c in kernels_verdicts.cells(small)}
    assert {"measured", "unsupported", "not installed"} <= ends
    cell = small.cells[bench.key_of("sdpa-cudnn", "causal", 48, False)]
    assert cell.outcome == "unsupported" and "cuda" in cell.reason


def test_flex_attention_is_exact_and_has_no_backward_on_a_cpu() -> None:
    names = "prefix_lm_document,block_causal_document"
    result = bench.run(masks=names, kernels="flex", backward=True, **SMALL)
    for cell in kernels_verdicts.cells(result):
        if cell.settings["backward"]:
            assert cell.outcome == "unsupported" and "CPU" in cell.reason
        else:
            assert cell.ok and cell.values["exact"]


def test_outcomes_are_told_apart() -> None:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError("only on Sundays")

    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    own = [
        kernel(refuse, "refuses"),
        kernel(full, "full"),
        kernel(lambda q, k, v, m: q[:, :, :3], "short"),
        kernel(lambda q, k, v, m: q * torch.nan, "nan"),
        kernel(lambda q, k, v, m: q + 1, "wrong"),
        kernel(lambda q, k, v, m: attend(q, k, v, mask=m).out, "huge", need=lambda c: 1e15),
        kernel(lambda q, k, v, m: (attend(q, k, v, mask=m).out, None), "pair"),
    ]
    result = bench.run(masks="causal", kernels="", extra=own, **SMALL)
    ends = {c.settings["kernel"]: (c.outcome, c.reason) for c in kernels_verdicts.cells(result)}
    assert ends["refuses"] == ("unsupported", "only on Sundays")
    assert ends["full"][0] == "out of memory" and ends["full"][1].startswith("met")
    assert ends["huge"][0] == "out of memory" and ends["huge"][1].startswith("predicted")
    assert ends["short"][0] == "failed" and "(1, 4, 3, 16)" in ends["short"][1]
    assert ends["nan"][0] == "failed" and "NaN" in ends["nan"][1]
    assert ends["wrong"][0] == "measured" == ends["pair"][0]
    wrong = result.cells[bench.key_of("wrong", "causal", 48, False)]
    assert not wrong.values["exact"]
    assert "wrong" in kernels_page.markdown(result, "x.json")


def test_a_compiled_kernel_runs_backward_often() -> None:
    """Checked with one backward, timed with several: torch frees what it compiled for one."""

    def plain(q: Any, k: Any, v: Any) -> Any:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return (q @ k.mT / q.shape[-1] ** 0.5).tanh().softmax(-1) @ v

    once = torch.compile(plain, backend="aot_eager")
    own = [kernel(lambda q, k, v, m: once(q, k, v), "compiled")]
    result = bench.run(masks="full", kernels="", extra=own, backward=True, **SMALL)
    assert {c.outcome for c in kernels_verdicts.cells(result)} == {"measured"}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "k.json"
    calls: list[int] = []

    def counted(q: Any, k: Any, v: Any, m: Any) -> Any:
        calls.append(1)
        if killed and len(calls) > 12:
            raise KeyboardInterrupt
        return attend(q, k, v, mask=m).out

    killed, own = True, kernel(counted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(masks="causal,full,sliding_window,full_document", kernels="", extra=[own],
                  out=out, **SMALL)  # fmt: skip
    saved = set(record.load(out).cells)
    assert 1 < len(saved) < 5
    killed, before = False, len(calls)
    result = bench.run(masks="causal,full,sliding_window,full_document", kernels="", extra=[own],
                       out=out, **SMALL)  # fmt: skip
    assert len(result.cells) == 5 and saved < set(result.cells)
    again = len(calls)
    bench.run(masks="causal", kernels="", extra=[own], out=out, **SMALL)
    assert again > before and len(calls) == again  # settled cells are not measured again


def test_another_run_in_the_same_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "k.json"
    bench.run(masks="causal", kernels="attend", out=out, **SMALL)
    with pytest.raises(InputError, match="holds another run: setting 'dim'"):
        bench.run(masks="causal", kernels="attend", out=out, **{**SMALL, "dim": 8})


def test_backward_gradients_are_compared() -> None:
    """A kernel that is right forward and wrong backward is found out."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 2 * grad

    own = kernel(lambda q, k, v, m: attend(Wrong.apply(q), k, v, mask=m).out)
    result = bench.run(masks="causal", kernels="", extra=[own], backward=True, **SMALL)
    exact = {c.settings["backward"]: c.values["exact"] for c in kernels_verdicts.cells(result)}
    assert exact == {False: True, True: False}


@pytest.mark.parametrize("name", list(patterns.PATTERNS))
def test_pointwise_rules_are_the_mask(name: str) -> None:
    case = Case(name, 40)
    rule, at = pointwise(case.mask), torch.arange(40)
    zero = torch.zeros((), dtype=torch.long)
    found = torch.stack([torch.stack([rule(zero, zero, i, j) for j in at]) for i in at])
    assert torch.equal(found, case.mask.cells(40, 40)[0, 0])


def test_the_registry_knows_and_says_why_not() -> None:
    known = kernels()
    for name in ("attend", "tiled", "naive", "sdpa-math", "sdpa-cpu-flash", "sdpa-cuda-flash",
                 "sdpa-efficient", "sdpa-cudnn", "flex", "flex-compiled", "flash-attn-2",
                 "flash-attn-3", "flashinfer", "xformers", "transformers:sdpa"):  # fmt: skip
        assert name in known
    assert any(n.startswith("diffusers") for n in known)
    wide = Case("global_sliding_window", 64, dtype=torch.bfloat16, device="cuda")
    assert "cannot express" in (known["sdpa-cuda-flash"].refuses(wide) or "")
    assert "cannot express" in (known["flash-attn-2"].refuses(wide) or "")
    assert known["flash-attn-2"].refuses(Case("causal_document", 64, dtype=torch.bfloat16)) is None
    assert why_not(known["attend"], Case("causal", 64)) is None


def test_functions_registered_with_transformers_are_found() -> None:
    transformers = pytest.importorskip("transformers")

    def mine(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> Any:
        causal = mask is None and module.is_causal
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, enable_gqa=True
        )
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("mine", mine)
    try:
        result = bench.run(masks="static", kernels="transformers:mine", **SMALL)
    finally:
        del transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping["mine"]
    assert all(c.ok and c.values["exact"] for c in kernels_verdicts.cells(result))


def test_peak_memory_sees_what_a_call_builds() -> None:
    amount, how = timer.peak(lambda: torch.ones(2**25).sum())
    assert 0.8 * 2**27 < amount < 1.6 * 2**27, how
    assert timer.peak(lambda: None)[0] < 2**23


def test_memory_of_attend_is_linear_and_naive_is_not() -> None:
    result = bench.run(masks="sliding_window_causal:window=100", lengths=[2048, 4096],
                       kernels="attend,naive", heads=(2, 1), dim=32, rounds=1,
                       progress=None)  # fmt: skip
    name = "sliding_window_causal:window=100"
    slopes = {n: kernels_verdicts.exponent(kernels_verdicts.memory(result, n, name))
              for n in ("attend", "naive")}  # fmt: skip
    assert slopes["attend"] < 1.4 and slopes["naive"] > 1.7


def made_up(times: dict[str, tuple[float, float, float]]) -> record.Result:
    """A result at 8k tokens: {mask: (kept share, seconds of sdpa, seconds of attend)}."""
    cells = {}
    for mask, (share, dense, ours) in times.items():
        for name, seconds in (("sdpa", dense), ("attend", ours)):
            about = {"kernel": name, "mask": mask, "tokens": 8192, "backward": False,
                     "area_share": share, "origin": "regard"}  # fmt: skip
            given = {"seconds": {"q50": seconds}, "peak_bytes": 8192}
            cells[bench.key_of(name, mask, 8192, False)] = record.Cell(about, values=given)
    targets = [t for t in bench.TARGETS if t["key"] == "faster"]
    return record.Result("kernels", {}, {}, targets, cells)


def test_the_ceiling_of_each_mask_stands_beside_the_target() -> None:
    """What leaving out can give follows from the area; a target above it is said to be."""
    result = made_up({"sliding_window": (0.125, 8.0, 1.0), "full_document": (0.5, 1.8, 1.0),
                      "causal_document": (0.25, 2.0, 1.0)})  # fmt: skip
    total, grid = kernels_verdicts.within_reach(result)
    rows = {line[0]: line[1:] for line in grid[1:]}
    assert total == 8192
    assert rows["sliding_window"] == ["0.125", "8.0x", "3x", "8.0x", "met"]
    assert rows["full_document"] == ["0.500", "2.0x", "3x", "1.8x", "beyond its area"]
    assert rows["causal_document"] == ["0.250", "4.0x", "3x", "2.0x", "missed"]
    said = kernels_verdicts.judge(result)[0]
    assert (
        said["verdict"] == "missed" and "full_document 1.8x (2.0x by its area)" in said["measured"]
    )
    met = made_up({"sliding_window": (0.125, 8.0, 1.0)})
    assert kernels_verdicts.judge(met)[0]["verdict"] == "met"
    assert kernels_verdicts.within_reach(record.Result("kernels", {}, {})) == (0, [])


def test_a_ceiling_is_computed_from_the_exact_area() -> None:
    result = bench.run(masks="prefix_lm_causal", lengths=[64], kernels="attend", heads=(2, 1),
                       dim=16, rounds=1, progress=None)  # fmt: skip
    mask = patterns.build("prefix_lm_causal", 64)
    found = kernels_verdicts.ceiling(result, "prefix_lm_causal", 64)
    assert found == 64 * 64 / mask.area(64, 64)


def test_the_committed_page_is_what_the_committed_result_gives() -> None:
    folder = Path(__file__).parents[2]
    source = "benchmarks/results/kernels.json"
    text = kernels_page.markdown(record.load(folder / source), source)
    assert (folder / "docs" / "bench-kernels.md").read_text(encoding="utf-8") == text
    assert "most by its area" in text


def test_pages(small: record.Result) -> None:
    text = kernels_page.markdown(small, "x.json")
    assert "flash-attn-2" in text and "not installed" in text
    assert text == kernels_page.markdown(small, "x.json")
    page = kernels_page.html(small)
    assert page.count("<svg") == 2 and "http-equiv" in page and "<script" not in page
    assert "sliding_window" in kernels_page.throughput(small).svg()
    for _, table in kernels_page.grids(small):
        assert table.columns[0].name == "mask" and {"sliding_window"} <= {r[0] for r in table.rows}


def test_plots_are_whole_and_leave_out_what_is_wrong() -> None:
    """Names stay inside, small figures keep their digits, and what is not drawn is counted."""
    own = [kernel(lambda q, k, v, m: attend(q, k, v, mask=m).out, f"a_kernel_of_mine_{n}.py:fn")
           for n in range(9)]  # fmt: skip
    own += [kernel(lambda q, k, v, m: q + 1, "wrong.py:fn")]
    result = bench.run(masks="causal", kernels="attend", extra=own, **SMALL)
    for cell in kernels_verdicts.cells(result):
        cell.values["throughput"] = 1e15 if cell.settings["kernel"] == "wrong.py:fn" else 0.5e9
    plot, roof = (chart.svg() for chart in kernels_page.charts(result))
    assert ">0.2</text>" in plot and ">0.4</text>" in plot
    for drawing, others in ((plot, 3), (roof, 4)):
        assert "wrong.py" not in drawing and f"{others} more in the tables<" in drawing
        wide, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawing)[0])
        texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="[^"]*">([^<]*)<', drawing)
        assert len(texts) > 8
        for x, y, words in texts:
            assert float(x) + 7.2 * len(words) <= wide and float(y) < height, words


@pytest.mark.parametrize("width", [60, 80, 160])
def test_names_of_masks_stay_whole_in_a_terminal(small: record.Result, width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(kernels_page.table(small))
    lines = console.export_text().splitlines()
    measured = kernels_verdicts.values(small, "mask")
    for mask in measured:
        assert any(f"{line} ".startswith(f"{mask} ") for line in lines), mask
    assert max(map(len, lines)) <= width


def test_names_are_escaped() -> None:
    own = kernel(lambda q, k, v, m: attend(q, k, v, mask=m).out, "<b>x</b>.py:fn")
    result = bench.run(masks="causal", kernels="", extra=[own], **SMALL)
    assert "<b>x" not in kernels_page.html(result) and "<b>x" not in kernels_page.markdown(
        result, ""
    )


def test_masks_are_drawn() -> None:
    made = patterns_page.cases("all", 16)
    assert len(made) == 14
    page = patterns_page.html(made)
    for name in patterns.PATTERNS:
        assert f"<h2>{name}</h2>" in page
    assert patterns_page.drawing(Case("full", 2)) == "██"


# -- the command line -----------------------------------------------------------------------------
def typed(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(args))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_add_benches_a_file(capsys: Any, tmp_path: Path) -> None:
    file, data, page = tmp_path / "mine.py", tmp_path / "r.json", tmp_path / "r.html"
    file.write_text("from regard.core import attend\n"
                    "def fn(q, k, v, mask):\n    s = attend(q, k, v, mask=mask)\n"
                    "    return s.out, s.lse\n")  # fmt: skip
    code, out, _ = typed(
        capsys, "bench", "add", f"{file}:fn", "--lengths", "64", "--heads", "2:1", "--dim", "16",
        "--rounds", "1", "--out", str(data), "--html", str(page),
    )  # fmt: skip
    assert code == 0 and "mine.py:fn" in out
    cells = record.load(data).cells
    assert cells[bench.key_of("mine.py:fn", "causal", 64, False)].values["exact"]
    assert "mine.py:fn" in page.read_text()


def test_masks_show(capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "m.html"
    code, out, _ = typed(capsys, "bench", "masks", "show", "--html", str(page))
    assert code == 0 and "causal_blockwise" in out and "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["kernels", "--kernels", "nope"], "unknown kernel 'nope'"),
        (["kernels", "--masks", "nope"], "unknown mask 'nope'"),
        (["kernels", "--masks", "sliding_window:prefix=3"], "takes window"),
        (["kernels", "--masks", "sliding_window:window=x"], "is no number"),
        (["kernels", "--masks", "sliding_window:window=-4", "--kernels", "attend"], "at least 0"),
        (["kernels", "--heads", "8:3"], "not a multiple"),
        (["kernels", "--heads", "x"], "--heads takes"),
        (["kernels", "--dtype", "int3"], "unknown dtype"),
        (["kernels", "--lengths", "zero"], "is not a length"),
        (["kernels", "--lengths", ","], "is empty"),
        (["kernels", "--out", "/nowhere/x.json"], "does not exist"),
        (["kernels", "--out", "-"], "name one in place of -"),
        (["kernels", "--html", "-"], "name one in place of -"),
        (["kernels", "--kernels", ""], "no kernel was named"),
        (["kernels", "--lengths", "\u00b2"], "is not a length"),
        (["kernels", "--heads", "8:\u00b2"], "--heads takes"),
        (["kernels", "--memory-limit", "inf"], "--memory-limit is a finite number, not inf"),
        (["kernels", "--threads", "100000"], "cores of this machine, got 100000"),
        (["kernels", "--device", "cpux"], "unknown device 'cpux'"),
        (["facts", "--device", "meta"], "unknown device 'meta'"),
        (["masks", "show", f"sliding_window:window={10**21}"], "is too large"),
        (["masks", "show", "block_sparse:density=inf"], "is too large"),
        (["add", "missing.py:fn"], "no file missing.py"),
        (["add", "missing"], "write mykernel.py:function"),
        (["masks", "show", "nope"], "unknown mask"),
    ],
)
def test_bad_input_is_one_line(capsys: Any, args: list[str], says: str) -> None:
    code, _, err = typed(capsys, "bench", *args)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1


def test_a_broken_file_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="does not run: ModuleNotFoundError"):
        load(f"{file}:fn")
    file.write_text("def run(): pass\n")
    with pytest.raises(InputError, match="no function 'fn'"):
        load(f"{file}:fn")


def test_lists_of_names() -> None:
    assert masks("regular") == list(patterns.PATTERNS)[:6]
    assert len(masks("all")) == 14 and len(masks("static,dynamic,causal")) == 14
    with pytest.raises(InputError, match="no kernel was named"):
        chosen(",", ["a"], "kernel")


def test_the_block_mask_of_a_case_is_its_own() -> None:
    """A kernel's rule does not come into what the mask keeps for the next who asks."""
    case = Case("causal", 256, 2, 2, 16, torch.float32, "cpu", False, 0)
    kept = case.mask.block_mask(256, 256, "cpu", BLOCK)
    rule = kept.mask_mod
    own = flex_mask(case)
    assert own.mask_mod is not rule and kept.mask_mod is rule
    assert own.to_dense().equal(kept.to_dense())


# -- a user's own files ----------------------------------------------------------------------------
RIGHT = """from regard.core import attend

def fn(q, k, v, mask):
    return attend(q, k, v, mask=mask).out
"""


def written(path: Path, text: str) -> Kernel:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return load(f"{path}:fn")


def test_two_kernels_of_one_name_are_refused(tmp_path: Path) -> None:
    own = [written(tmp_path / folder / "mk.py", RIGHT) for folder in "ab"]
    with pytest.raises(InputError, match=r"two kernels are named mk\.py:fn: rename one"):
        bench.run(masks="causal", kernels="", extra=own, **SMALL)
    with pytest.raises(InputError, match="two kernels are named attend"):
        bench.run(masks="causal", kernels="attend", extra=[kernel(torch.add, "attend")], **SMALL)


def test_a_kernel_is_measured_anew_when_its_file_was_edited(tmp_path: Path) -> None:
    """Cells of the old file go, those of other lengths included: one column is one kernel."""
    file, out = tmp_path / "mk.py", tmp_path / "r.json"
    refuses = "def fn(q, k, v, mask):\n    raise NotImplementedError('not yet')\n"
    ends = []
    for text, length in ((refuses, 48), (RIGHT, 48), (RIGHT, 32), (RIGHT + "# later\n", 32)):
        own = written(file, text)
        found = bench.run(masks="causal", kernels="attend", extra=[own], out=out,
                          **(SMALL | {"lengths": [length]}))  # fmt: skip
        ends.append([(c.settings["tokens"], c.outcome) for c in kernels_verdicts.cells(found)
                     if c.settings["kernel"] == "mk.py:fn"])  # fmt: skip
    assert ends == [[(48, "unsupported")], [(48, "measured")],
                    [(48, "measured"), (32, "measured")], [(32, "measured")]]  # fmt: skip


def test_a_file_that_leaves_is_told_and_dataclasses_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not run: SystemExit: 3"):
        written(tmp_path / "leaves.py", "import sys\nsys.exit(3)\n")
    assert not any(n.startswith("regard_user_leaves") for n in sys.modules)
    late = written(tmp_path / "late.py", "import sys\n\ndef fn(q, k, v, mask):\n    sys.exit(4)\n")
    data = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    data += "\n@dataclass\nclass Size:\n    n: int\n\n" + RIGHT
    result = bench.run(masks="causal", kernels="", extra=[late, written(tmp_path / "d.py", data)],
                       **SMALL)  # fmt: skip
    ends = {c.settings["kernel"]: (c.outcome, c.reason) for c in kernels_verdicts.cells(result)}
    assert ends == {"late.py:fn": ("failed", "SystemExit: 4"), "d.py:fn": ("measured", "")}
