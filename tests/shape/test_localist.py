"""The locality dial: the dense edit, bounds, padding, decoding, rules, calibration, bad input."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler
from regard.shape.localist.calibrate import calibrate_dial, read_dial
from regard.shape.localist.facts import Rows, dialled, needed, of_scores
from regard.shape.localist.method import LocalityDial
from regard.shape.localist.rules import Rule, read_rules
from regard.zoo.tiny import inputs, tiny

from ..cli.command import run, stand_in
from ..shrink.explicit import ids, wide

BLOCKS: dict[str, Any] = {"a": [[1, 9]], "b": [[9, 20], [24, 28]]}
DIAL: dict[str, Any] = {"blocks": BLOCKS, "toward": "a", "locality": 0.6}


def logits(model: Any, dial: Handler | None, **given: Any) -> Tensor:
    with torch.no_grad(), regard.apply(model, *([dial] if dial else [])):
        out: Tensor = model(**given).logits
    return out


class Explicit(Handler):
    """The dial on the dense map, cell by cell."""

    def __init__(self, toward: int, lower: float, own: bool = True) -> None:
        self.toward, self.lower, self.own = toward, lower, own

    def after(self, call: Call, state: State) -> State:
        n = call.k.shape[2]
        block = [0] * n
        for number, spans in enumerate(BLOCKS.values(), 1):
            for first, end in spans:
                for j in range(first, min(end, n)):
                    block[j] = number
        bias = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                seen = {0, self.toward} if not block[i] else {0, block[i]}
                if block[i] and not self.own:
                    seen = {0, 1, 2}
                bias[i, j] = 0 if block[j] in seen else -self.lower
        groups = call.q.shape[1] // call.k.shape[1]
        k, v = (x.double().repeat_interleave(groups, 1) for x in (call.k, call.v))
        z = call.q.double() @ k.mT * call.scale + bias
        z = z.masked_fill(~call.mask.cells(n, n), -torch.inf)
        return State((z.softmax(-1) @ v).to(state.out.dtype), z.logsumexp(-1).to(state.lse.dtype))


@pytest.mark.parametrize("change", [{}, {"own": False}, {"hard": True, "locality": 1.0}], ids=str)
def test_it_is_the_dense_edit(change: dict[str, Any]) -> None:
    model, text = wide(), ids(33, rows=2)
    dial = LocalityDial(**{**DIAL, **change})
    lower = torch.inf if dial.hard else dial.locality * dial.beta
    want = logits(model, Explicit(1, lower, dial.own), input_ids=text)
    torch.testing.assert_close(logits(model, dial, input_ids=text), want, rtol=1e-9, atol=1e-9)
    assert (want - logits(model, None, input_ids=text)).abs().max() > 1e-3


def test_locality_0_is_the_model_bit_for_bit() -> None:
    model, text = tiny("llama"), ids(33)
    plain = logits(model, None, input_ids=text)
    assert torch.equal(
        plain, logits(model, LocalityDial(**{**DIAL, "locality": 0.0}), input_ids=text)
    )
    deep = LocalityDial(**{**DIAL, "depth": 3.0})
    assert deep.sites(regard.reach.Session(model).sites)  # acts, but not in layer 0
    assert float(deep.shift(0, torch.ones(1))) == 0 < float(deep.shift(1, torch.ones(1)))
    read = read_dial(model, LocalityDial(**{**DIAL, "locality": 0.0}), input_ids=text)
    assert read["outside"]["leakage"] > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_padded_row_is_the_row_alone(family: str) -> None:
    model, text = tiny(family), ids(30)
    model.generation_config.eos_token_id = None
    pad = torch.zeros(1, 5, dtype=torch.long)
    live = torch.cat([pad, torch.ones_like(text)], 1)
    dial = LocalityDial(**DIAL)
    with torch.no_grad(), regard.apply(model, dial):
        kept = {"max_new_tokens": 4, "do_sample": False, "output_logits": True,
                "return_dict_in_generate": True}  # fmt: skip
        alone = model.generate(text, attention_mask=torch.ones_like(text), **kept)
        first = dial.report()["outside"]
        padded = model.generate(torch.cat([pad, text], 1), attention_mask=live, **kept)
    torch.testing.assert_close(
        torch.stack(alone.logits), torch.stack(padded.logits), rtol=1e-3, atol=1e-4
    )
    again = dial.report()["outside"]
    assert again["rows"] == first["rows"]
    assert again["first_token_mass"] == pytest.approx(first["first_token_mass"], abs=1e-4)
    # prefill = decode: the whole text at once gives the same last tokens
    whole = logits(model, LocalityDial(**DIAL), input_ids=alone.sequences[:, :-1])
    torch.testing.assert_close(whole[0, -4:], torch.stack(alone.logits)[:, 0], rtol=1e-3, atol=1e-4)


def rows_of(z: Tensor, inside: Tensor) -> Rows:
    none = torch.zeros(len(z), dtype=z.dtype)
    return Rows(**of_scores(z, inside, ~inside), lse_free=none, lse_first=none, free_in=none)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0, 30), st.floats(0, 20),
    st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31),
)  # fmt: skip
def test_bounds_hold(
    s: int, other: int, spread: float, shift: float, dtype: torch.dtype, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    z = torch.randn(16, s + other, generator=make, dtype=torch.float64).to(dtype) * spread
    inside = (torch.arange(s + other) < s).expand(16, -1)
    made = dialled(rows_of(z, inside), shift)
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    for name, over in made.excess().items():
        allowed = slack * (made.entropy.clamp_min(1) if name == "C3" else 1)
        assert bool((over <= allowed).all()), (name, float(over.max()))
    # against the dense row
    p = (z.double() - shift * ~inside).softmax(-1)
    eps = (p * ~inside).sum(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(made.leakage.double(), eps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.entropy.double(), entropy, rtol=1e-4, atol=2e-5)
    # C4: the strength that it asks for keeps the leakage, whatever the row
    enough = needed(rows_of(z, inside), 0.05)
    assert bool((dialled(rows_of(z, inside), enough).leakage <= 0.05 + slack).all())


def test_bounds_are_tight_and_can_fail() -> None:
    z = torch.tensor([[3.0, 3.0, 1.0, 1.0, 1.0]])
    inside = torch.tensor([[True, True, False, False, False]])
    made = dialled(rows_of(z, inside), 0.5)
    torch.testing.assert_close(made.leakage, made.leakage_bound)
    torch.testing.assert_close(made.entropy, made.entropy_bound)
    wrong = rows_of(z, inside)
    wrong = Rows(**{**wrong.__dict__, "least_in": wrong.least_in + 1})
    assert float(dialled(wrong, 0.5).excess()["C1"]) > 0.01


def test_leakage_falls_with_the_dial_and_meets_the_target() -> None:
    model, text = tiny("llama"), ids(36)
    read = [
        read_dial(model, LocalityDial(**{**DIAL, "locality": x}), input_ids=text)["outside"]
        for x in (0.0, 0.3, 0.6, 1.0)
    ]
    assert all(a["leakage"] > b["leakage"] for a, b in pairwise(read))
    assert all(not any(one["violations"].values()) for one in read)
    for rule in ("mean", "bound"):
        dial = LocalityDial(**DIAL)
        found = calibrate_dial(model, dial, [{"input_ids": text}], target=0.03, rule=rule)
        assert found.leakage <= 0.03 < found.plain and dial.beta == found.beta
        again = read_dial(model, dial, input_ids=text)["outside"]["leakage"]
        assert again == pytest.approx(found.leakage, abs=1e-5)
    assert found.guaranteed == 1.0


def test_rules_from_yaml_fire_and_are_logged(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "rules:\n"
        "  - {name: tenant b, when: {metadata: {tenant: b}}, allow: [b]}\n"
        "  - {name: late, when: {span: [30, null]}, deny: [a]}\n"
    )
    model, text = tiny("llama"), ids(36)
    plain = LocalityDial(blocks=BLOCKS, toward="b", locality=1.0)
    dial = LocalityDial(blocks=BLOCKS, rules=str(file), locality=1.0, metadata={"tenant": "b"})
    dial.remove_rule("late")
    assert torch.equal(logits(model, plain, input_ids=text), logits(model, dial, input_ids=text))
    assert dial.report()["fired"] == [
        {"rule": "tenant b", "row": 0, "queries": [[0, 1], [20, 24], [28, 36]]}
    ]
    dial = LocalityDial(blocks=BLOCKS, rules=str(file), locality=1.0)  # another tenant
    logits(model, dial, input_ids=text)
    assert [f["rule"] for f in dial.report()["fired"]] == ["late"]


def test_rules_change_while_it_runs() -> None:
    model, text = tiny("llama"), ids(36)
    dial = LocalityDial(**DIAL)
    with torch.no_grad(), regard.apply(model, dial):
        toward_a = model(text).logits
        dial.add_rule({"name": "no a", "deny": ["a"]})
        without = model(text).logits
        dial.remove_rule("no a")
        assert torch.equal(model(text).logits, toward_a)
        dial.turn(0.0)
        torch.testing.assert_close(
            model(text).logits, logits(model, None, input_ids=text), rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(without, toward_a, atol=1e-3)


def test_blocks_by_token_go_on_in_the_cache() -> None:
    model, text = tiny("llama"), ids(30)
    model.generation_config.eos_token_id = None

    def parity(given: Tensor) -> Tensor:
        return 1 + given % 2

    parity.names = ["even", "odd"]  # type: ignore[attr-defined]
    dial = LocalityDial(blocks=parity, locality=1.0)
    for beams in (1, 3):
        with torch.no_grad(), regard.apply(model, dial):
            out = model.generate(text, max_new_tokens=5, do_sample=False, num_beams=beams)
            whole = model(out[:, :-1]).logits
        if beams == 1:
            assert whole[0, -5:].argmax(-1).tolist() == out[0, -5:].tolist()


def test_learned_sinks_and_caps_and_distance() -> None:
    for family in ("gpt_oss", "gemma2"):
        model = tiny(family)
        given = inputs(family, model)
        dial = LocalityDial(blocks={"a": [[1, 4]], "b": [[4, 8]]}, toward="a", locality=1.0)
        out = logits(model, dial, **given)
        assert bool(out.isfinite().all()) and not any(
            dial.report()["outside"]["violations"].values()
        )
    with pytest.raises(ReachError, match="tau"):
        logits(model, LocalityDial(**{**DIAL, "tau": 0.5}), **given)
    model, text = wide(), ids(20)

    class Far(Handler):
        def after(self, call: Call, state: State) -> State:
            n = call.k.shape[2]
            k, v = (x.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
                    for x in (call.k, call.v))  # fmt: skip
            at = torch.arange(n)
            z = call.q @ k.mT * call.scale - 0.5 * (at[:, None] - at) / 4
            z = z.masked_fill(~call.mask.cells(n, n), -torch.inf)
            return State(z.softmax(-1) @ v, z.logsumexp(-1))

    dial = LocalityDial(bias="distance", locality=0.5)
    torch.testing.assert_close(
        logits(model, dial, input_ids=text), logits(model, Far(), input_ids=text)
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"locality": 1.5}, "locality"),
        ({"beta": 0.0}, "beta"),
        ({"blocks": None}, "needs blocks"),
        ({"blocks": {}}, "needs blocks"),
        ({"blocks": {"a": [[1, 9]], "b": [[8, 12]]}}, "overlap"),
        ({"blocks": {"a": [[9, 1]]}}, "ranges"),
        ({"blocks": {"a": []}}, "no tokens"),
        ({"toward": "c"}, "none of"),
        ({"rules": [{"name": "x", "allow": ["a"], "deny": ["a"]}]}, "both allows and denies"),
        ({"rules": [{"name": "x", "allow": ["z"]}]}, "none of"),
        ({"rules": [{"name": "x"}]}, "neither"),
        ({"rules": [{"name": "x", "allow": ["a"], "when": {"who": 1}}]}, "no 'who'"),
        ({"rules": [{"name": "x", "deny": ["free"]}]}, "sink"),
        ({"rules": "missing.yaml"}, "no file of rules"),
        ({"rules": [{"name": "x", "allow": ["a"]}] * 2}, "two rules"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_one_clear_error(change: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        LocalityDial(**{**DIAL, **change})


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    model, text = tiny("llama"), ids(30)
    two = [{"name": "x", "allow": ["a"], "weight": 0.5}, {"name": "y", "allow": ["b"]}]
    with pytest.raises(InputError, match="weight"):
        logits(model, LocalityDial(blocks=BLOCKS, rules=two, locality=1.0), input_ids=text)
    strict = LocalityDial(**{**DIAL, "strict": True, "hard": True, "locality": 1.0})
    with pytest.raises(InputError, match="no relevant block"):
        logits(model, strict, input_ids=text)
    bad = tmp_path / "bad.yaml"
    bad.write_text("rules: [")
    with pytest.raises(InputError, match="no YAML"):
        read_rules(bad)
    bad.write_text("rules: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="no YAML"):
        read_rules(bad)
    with pytest.raises(InputError, match="a list"):
        read_rules({"rules": "a"})
    with pytest.raises(InputError, match="no token outside"):
        calibrate_dial(model, LocalityDial(**DIAL), [{"input_ids": text[:, :12]}])
    assert Rule.of(Rule("x", ("a",)).as_dict()) == Rule("x", ("a",))


def test_the_command_answers_at_both_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, 3)
    for name, words in (("a", "the cat sat on the mat"), ("b", "a dog ran to the red house")):
        (tmp_path / f"{name}.txt").write_text(words)
    docs = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    page, out = tmp_path / "audit.html", tmp_path / "found.json"
    asked = ["--toward", "a", "--locality", "0.6", "--question", "who sat there", "-n", "4"]
    code, text, said = run(
        capsys, "run", "localist", "--docs", *docs, *asked, "--html", str(page), "--json", str(out)
    )
    assert code == 0, said
    found = json.loads(out.read_text())
    zero, turned = found["figures"]
    assert zero["leakage"] > turned["leakage"] and zero["fidelity"] < turned["fidelity"]
    assert not any(zero["violations"].values()) and not any(turned["violations"].values())
    assert "leakage" in text and "does not show that the answer is faithful" in page.read_text()
    code, *_ = run(capsys, "run", "localist", "--docs", *docs, *asked, "--leakage", "0.01",
                   "--json", str(out))  # fmt: skip
    assert code == 0 and json.loads(out.read_text())["calibration"]["leakage"] <= 0.01
    for wrong, word in (
        (["--docs", docs[0], *asked], "two at least"),
        (["--docs", *docs, *asked[2:]], "--toward"),
        (["--docs", *docs, "--toward", "c", *asked[2:]], "none of"),
        (["--docs", *docs, *asked, "--locality", "0"], "locality"),
        (["--docs", *docs, *asked, "--leakage", "2"], "between 0 and 1"),
        (["--docs", *docs, *asked, "--metadata", "x"], "key=value"),
    ):
        code, _, said = run(capsys, "run", "localist", *wrong)
        assert code == 2 and word in said
