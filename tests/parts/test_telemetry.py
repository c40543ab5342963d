"""Telemetry: the right numbers, no trace in the training, alarms before the loss moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import InputError, ReachError
from regard.parts.training.telemetry import Alarms
from regard.zoo.tiny import tiny


def ids(batch: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(model: Any, telemetry: Any, count: int, **inputs: Any) -> list[float]:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for n in range(count):
        given = ids(seed=n)
        loss = model(input_ids=given, labels=given, **inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        if telemetry is not None:
            telemetry.step(model)
    return losses


def maps(model: Any, given: Tensor, mask: Tensor | None = None) -> tuple[Any, Any]:
    """The attention maps and states of the model's own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.eval()(
            given, attention_mask=mask, output_attentions=True, output_hidden_states=True
        )
    model.set_attn_implementation("sdpa")
    return torch.stack(out.attentions), torch.stack(out.hidden_states)


@pytest.mark.parametrize("padded", [False, True])
def test_a_line_holds_what_eager_attention_gives(padded: bool) -> None:
    model, telemetry = tiny("llama").train(), regard.Telemetry(every=3, rows=2)
    mask = torch.ones(4, 24, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
    steps(model, telemetry, 3, attention_mask=mask)
    (line,) = telemetry.lines
    given = ids(seed=2)[:2]
    a, states = maps(model, given, mask[:2])
    live = mask[:2].bool()
    entropy = -torch.xlogy(a, a).sum(-1) * live[None, :, None]
    assert torch.allclose(
        torch.tensor(line["entropy"]), entropy.sum((1, 3)) / live.sum(), atol=1e-5
    )
    i = torch.arange(24)
    away = (a * (i[:, None] - i).abs()).sum(-1) * live[None, :, None]
    assert torch.allclose(torch.tensor(line["distance"]), away.sum((1, 3)) / live.sum(), atol=1e-4)
    first = [5, 0] if padded else [0, 0]
    sink = torch.stack([a[:, b, :, f:, f].mean(-1) for b, f in enumerate(first)]).mean(0)
    assert torch.allclose(torch.tensor(line["sink"]), sink, atol=1e-5)
    norms = states.norm(dim=-1)
    ratio = torch.stack(
        [norms[:, b, f] / norms[:, b, f + 1 :].mean(-1) for b, f in enumerate(first)]
    ).mean(0)
    assert torch.allclose(torch.tensor(line["norm_ratio"]), ratio, atol=1e-4)


def test_the_largest_logit_is_that_of_the_dense_map() -> None:
    model, telemetry = tiny("llama").train(), regard.Telemetry(every=1, rows=4)
    telemetry.step(model)
    steps(model, telemetry, 1)
    attention, kept = model.model.layers[1].self_attn, {}
    attention.register_forward_hook(
        lambda m, args, kwargs, out: kept.update(kwargs), with_kwargs=True
    )
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        model.eval()(ids(seed=0))
        x = kept["hidden_states"]
        q, k = (
            p(x).view(4, 24, -1, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *kept["position_embeddings"])
        s = q @ k.repeat_interleave(2, 1).mT / 4
    s = s.masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), -torch.inf)
    truth = s.amax((0, 2, 3))
    assert torch.allclose(torch.tensor(telemetry.lines[0]["max_logit"][1]), truth, atol=1e-5)


# -- no trace --------------------------------------------------------------------------------------
def test_the_training_is_bit_equal_with_and_without() -> None:
    runs = []
    for telemetry in (None, regard.Telemetry(every=2)):
        model = tiny("llama").train()
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        torch.manual_seed(5)
        losses = steps(model, telemetry, 6)
        assert model.training and all(m.training for m in model.modules())
        assert not model._forward_pre_hooks
        runs.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def test_gradient_checkpointing() -> None:
    model, telemetry = tiny("llama").train(), regard.Telemetry(every=2)
    model.gradient_checkpointing_enable()
    losses = steps(model, telemetry, 4)
    plain = tiny("llama").train()
    assert losses == pytest.approx(steps(plain, None, 4), abs=1e-6)
    assert [line["step"] for line in telemetry.lines] == [2, 4]


def test_bfloat16_autocast() -> None:
    lines = []
    for on in (False, True):
        model, telemetry = tiny("llama").train(), regard.Telemetry(every=1, rows=4)
        telemetry.step(model)
        given = ids()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            model(input_ids=given, labels=given).loss.backward()
        lines.append(telemetry.step(model))
    wide, half = (torch.tensor(x["entropy"]) for x in lines)
    assert torch.allclose(wide, half, atol=0.05) and not torch.equal(wide, half)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    telemetry = regard.Telemetry(every=2)
    losses = steps(model, telemetry, 4)
    assert len(losses) == 4 and [line["step"] for line in telemetry.lines] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_compiled_models_are_not_recompiled_and_do_not_break(way: str) -> None:
    """With `fullgraph=True` a graph break is an error; graphs are counted."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = tiny("llama").train()
    model: Any = plain
    if way == "torch.compile":
        model = torch.compile(plain, backend=backend, fullgraph=True)
    else:
        plain.compile(backend=backend, fullgraph=True)
    telemetry = regard.Telemetry(every=3)
    losses = []
    for n in range(7):
        given = ids(seed=n)
        losses.append(float(model(input_ids=given, labels=given).loss.detach()))
        telemetry.step(model)
        if n == 0:
            before = len(compiled)
    assert [line["step"] for line in telemetry.lines] == [3, 6]
    assert before == len(compiled) >= 1
    torch._dynamo.reset()


# -- alarms ----------------------------------------------------------------------------------------
def test_a_planted_explosion_is_reported_before_the_loss_moves() -> None:
    model, raised = tiny("llama").train(), []
    telemetry = regard.Telemetry(every=5, on_alarm=raised.append)
    head = model.model.layers[1].self_attn.q_proj.weight[32:48]  # queries of head 2
    given = ids()
    losses = []
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(3)
        model.model.layers[1].self_attn.k_proj.weight.mul_(3)
        for n in range(60):
            if n >= 20:
                head.mul_(1.08)
            losses.append(float(model(input_ids=given, labels=given).loss))
            telemetry.step(model)
            if raised:
                break
    assert raised and raised[0]["alarm"] == "logits grow"
    assert (raised[0]["layer"], raised[0]["head"]) == (1, 2)
    assert raised[0]["to"] >= 4 * raised[0]["from"]
    assert abs(losses[-1] - losses[0]) < 0.02 * losses[0]
    assert not any(line["alarms"] for line in telemetry.lines[:4])


def line(step: int, **changes: float) -> dict[str, Any]:
    given = {"max_logit": 5.0, "entropy": 2.0, "sink": 0.1} | changes
    return {"step": step, "layers": [0], **{n: [[1.0, x]] for n, x in given.items()}}


@pytest.mark.parametrize(
    "name, before, after, quiet",
    [
        ("logits grow", {"max_logit": 5.0}, {"max_logit": 20.0}, {"max_logit": 19.0}),
        ("entropy collapses", {"entropy": 0.5}, {"entropy": 0.09}, {"entropy": 0.11}),
        ("a sink appears", {"sink": 0.29}, {"sink": 0.31}, {"sink": 0.3}),
    ],
)
def test_thresholds(
    name: str, before: dict[str, float], after: dict[str, float], quiet: dict[str, float]
) -> None:
    alarms = Alarms()
    (found,) = alarms.raised([line(50, **before)], line(200, **after))
    assert found["alarm"] == name and (found["layer"], found["head"]) == (0, 1)
    assert not alarms.raised([line(50, **before)], line(200, **quiet))
    assert not alarms.raised([line(50, **before)], line(251, **after))  # too long ago
    assert not alarms.raised([], line(200, **after))


def test_small_logits_may_grow() -> None:
    assert not Alarms().raised([line(50, max_logit=0.5)], line(100, max_logit=9.0))


# -- a Trainer -------------------------------------------------------------------------------------
def test_in_a_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Reporter(TrainerCallback):
        """Stands for trackio, TensorBoard or wandb."""

        logs: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.logs.append(dict(logs))

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        given = torch.tensor([r["input_ids"] for r in rows])
        return {"input_ids": given, "labels": given}

    telemetry = regard.Telemetry(every=2)
    trainer = Trainer(
        model=tiny("llama"),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2, save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids(32).tolist()}),
        data_collator=collate,
        callbacks=[Reporter(), telemetry],
    )  # fmt: skip
    telemetry.reports(trainer)
    trainer.train()
    written = [json.loads(x) for x in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    assert [x["step"] for x in written] == [2, 4] and written == telemetry.lines
    logged = [x for x in Reporter.logs if "telemetry/max_logit" in x]
    assert len(logged) == 2
    assert logged[0]["telemetry/max_logit"] == written[0]["summary"]["max_logit"]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every is a whole number"):
        regard.Telemetry(every=0)
    with pytest.raises(InputError, match="make it first"):
        regard.Telemetry(path=tmp_path / "nowhere" / "x.jsonl")
    with pytest.raises(InputError, match="growth above 1"):
        Alarms(growth=1.0)
    with pytest.raises(ReachError):
        regard.Telemetry().on_train_begin(None, None, None, model=tiny("bert").embeddings)
