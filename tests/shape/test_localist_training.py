"""Locality in training: the proximal step and its certificate, the fidelity loss, recruitment."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import InputError
from regard.reach import Session
from regard.shape.localist.facts import row_facts
from regard.shape.localist.recruit import description, recruit, shard
from regard.shape.localist.topics import Topics
from regard.shape.localist.training import (
    Plan,
    TrainingDial,
    certificate,
    dial_table,
    groups_of,
    proximal_step,
    train_topics,
)
from regard.zoo.tiny import tiny

from ..cli.command import run
from ..shrink.explicit import Dense, wide


def test_the_proximal_step_is_the_formula() -> None:
    model = copy.deepcopy(tiny("llama"))
    old = [(n, w.clone()) for n, w, _ in groups_of(model, 4)]
    zeros = proximal_step(model, 4, 0.02)
    counted = 0
    for (_, before), (_, after, _) in zip(old, groups_of(model, 4)):
        heads, dim, count, features = before.shape
        for h in range(heads):
            for g in range(count):
                group = before[h, :, g]
                shrunk = max(0.0, 1 - 0.02 * math.sqrt(dim * features) / float(group.norm()))
                torch.testing.assert_close(after[h, :, g], shrunk * group)
                counted += shrunk == 0
    # key heads are shared by query heads: their groups are there once
    config = model.config
    assert {w.shape[0] for _, w in old} == {config.num_attention_heads, config.num_key_value_heads}
    assert zeros == counted
    assert proximal_step(model, 4, 1e3) == sum(w.shape[0] * w.shape[2] for _, w in old)
    with pytest.raises(InputError, match="divisor"):
        proximal_step(model, 7, 0.1)


def test_the_certificate_holds_where_gradient_steps_end() -> None:
    """Proximal gradient on a quadratic ends in a stationary point: D1 to rounding."""
    model = copy.deepcopy(tiny("llama"))
    make = torch.Generator().manual_seed(0)
    weights = [m.weight for layer in model.model.layers
               for m in (layer.self_attn.q_proj, layer.self_attn.k_proj)]  # fmt: skip
    goals = [torch.randn(w.shape, generator=make) * 0.03 for w in weights]
    for goal in goals:
        goal[:, : goal.shape[1] // 2] *= 0.1

    def backward() -> None:
        model.zero_grad()
        sum(
            (0.5 * (w - g).square().sum() for w, g in zip(weights, goals)), torch.zeros(())
        ).backward()

    strength = 0.01
    for _ in range(60):
        backward()
        with torch.no_grad():
            for w in weights:
                w -= 0.5 * w.grad  # type: ignore[operator]
        proximal_step(model, 4, 0.5 * strength)
    backward()
    found = certificate(model, 4, strength)
    assert found["zero groups"] > 0 < found["live groups"]
    assert found["holds for zero groups"]
    assert found["largest gradient over threshold, zero groups"] < 1
    assert found["largest equality residual, live groups"] < 1e-4
    backward()
    wrong = certificate(model, 4, strength / 100)
    assert not wrong["holds for zero groups"]


def test_the_fidelity_loss_and_its_gradient() -> None:
    topics = Topics()
    model = wide()
    model.config.vocab_size = topics.vocabulary
    ids = topics.draw(2, 24, 0)
    dial = TrainingDial(blocks=topics, locality=1.0, check=False)

    def loss() -> Tensor:
        dial.begin(0.0)
        with Session(model, [dial]):
            model(ids)
        return dial.loss()

    first = loss()
    weight = model.model.layers[0].self_attn.q_proj.weight
    # of the first layer: behind it norms in float32 drown differences as small as these
    (grad,) = torch.autograd.grad(dial.losses[0], weight)
    # against the dense rows
    seen = Dense()
    with Session(model, [seen]), torch.no_grad():
        model(ids)
    dense = []
    for call in seen.calls.values():
        roles = dial.roles(call)
        rows = row_facts(call, roles.keys, roles.relevant)
        whole = torch.logaddexp(rows.lse_in, rows.lse_out)
        dense.append((whole - rows.lse_in).mean())
    assert float(first.detach()) == pytest.approx(float(torch.stack(dense).mean()), abs=1e-9)
    at, step = divmod(int(grad.abs().argmax()), grad.shape[1]), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[at] += sign * step
        loss()
        values.append(float(dial.losses[0].detach()))
        with torch.no_grad():
            weight[at] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert float(grad[at]) == pytest.approx(slope, rel=1e-5) and abs(slope) > 1e-4


def test_topics_are_what_they_say() -> None:
    topics = Topics(noise=4)
    text = topics.draw(8, 200, 1, run=5, noisy=0.2)
    assert torch.equal(text, topics.draw(8, 200, 1, run=5, noisy=0.2))
    assert int(text.max()) < topics.vocabulary
    for row in topics(text):
        assert len(set(row.tolist()) - {0}) == 2
    with pytest.raises(InputError, match="two topics"):
        topics.draw(1, 8, 0, among=(1,))


@pytest.mark.slow
def test_training_with_locality() -> None:
    topics, plan = (
        Topics(),
        Plan(steps=60, batch=8, length=32, width=32, heads=2, texts=8, rho=0.05),
    )
    model, facts = train_topics(topics, plan)
    assert facts["loss"][-1] < facts["loss"][0]
    table = dial_table(model, topics, plan, (0.0, 0.5, 1.0))
    assert table[0]["leakage"] > table[1]["leakage"] > table[2]["leakage"]
    assert not any(sum(row["violations"].values()) for row in table)


@pytest.fixture(scope="module")
def half_taught() -> tuple[Topics, Any]:
    topics = Topics(noise=8)
    plan = Plan(steps=120, length=64, width=32, heads=2)
    return topics, train_topics(topics, plan, localist=False, among=(0, 1), run=14, noisy=0.2)[0]


KNOWN = [list(range(9, 17)), list(range(17, 25))]


@pytest.mark.slow
def test_recruitment_finds_the_missing_blocks_and_stops(half_taught: tuple[Topics, Any]) -> None:
    topics, model = half_taught
    fit, judge = (shard(model, topics.draw(256, 64, n, run=14, noisy=0.2)) for n in (1, 2))
    trace = recruit(fit, judge, known=KNOWN)
    assert sorted(sorted(b.tokens) for b in trace.blocks) == [
        list(range(25, 33)), list(range(33, 41)),
    ]  # fmt: skip
    # the trace adds up, in bits
    total = trace.start
    for row in trace.rows:
        if row["accepted"]:
            total -= row["saved"] - row["paid"]
            if row["step"] == "recruit":
                assert row["saved"] - row["paid"] > 10
        assert row["length"] == pytest.approx(total)
    assert trace.end == pytest.approx(total) == description(judge, trace.blocks, 2).total
    refused = {t for row in trace.rows if not row["accepted"] for t in row["tokens"]}
    assert refused & set(range(41, 49))  # the noise was tried
    assert trace.end < trace.start - 2 * 10


@pytest.mark.slow
def test_noise_is_refused(half_taught: tuple[Topics, Any]) -> None:
    topics, model = half_taught
    texts = [topics.draw(256, 64, n, (0, 1), run=14, noisy=0.2) for n in (1, 2)]
    trace = recruit(*(shard(model, t) for t in texts), known=KNOWN)
    assert trace.rows and not trace.blocks and trace.end == trace.start
    assert any(set(row["tokens"]) & set(range(41, 49)) for row in trace.rows)


def test_bad_shards_are_refused() -> None:
    topics = Topics()
    model = train_topics(
        topics, Plan(steps=1, batch=2, length=16, width=16, heads=2), localist=False
    )[0]
    one = shard(model, topics.draw(2, 16, 0))
    with pytest.raises(InputError, match="other texts"):
        recruit(one, one)
    with pytest.raises(InputError, match="eta"):
        recruit(one, shard(model, topics.draw(2, 16, 1)), eta=0)
    with pytest.raises(InputError, match="empty"):
        shard(model, torch.zeros(0, 5, dtype=torch.long))


def test_the_commands_train_and_recruit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    code, text, said = run(
        capsys, "train", "localist", "--steps", "2", "--batch", "2", "--length", "12", "--width",
        "16", "--device", "cpu", "--out", str(out),
    )  # fmt: skip
    assert code == 0, said
    found = json.loads(out.read_text())
    assert [row["locality"] for row in found["plain"]["dial"]] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert "equality residual" in text and found["localist"]["training"]["certificate"]
    code, text, said = run(
        capsys, "train", "recruit", "--steps", "2", "--texts", "8", "--out", str(out)
    )
    assert code == 0, said
    found = json.loads(out.read_text())
    assert found["end"] <= found["start"] and "bits at the start" in text
    for words in (["localist", "--data", "x.txt"], ["recruit", "--data", "x.txt"],
                  ["localist", "--width", "20"]):  # fmt: skip
        code, _, said = run(capsys, "train", *words)
        assert code == 2 and words[1] in said
