"""The door into diffusion models: same images, right halves, steps and segments, no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Session
from regard.reach.denoising import columns
from regard.reach.dispatch import _active

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.reach import diffusers as door
from regard.zoo.tiny_diffusion import tiny_pipeline

from .. import pipelines

PROMPT = "a red circle and a blue square"
run = partial(pipelines.run, prompt=PROMPT)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Whatever a test does, no session stays open and no function mode stays on."""
    from torch.overrides import _get_current_function_mode_stack

    yield
    assert not _active and not door._open
    assert not _get_current_function_mode_stack()


def denoiser(pipe: Any) -> Any:
    return door.body(pipe)


def plain(pipe: Any, **kwargs: Any) -> Any:
    """The pipeline without a session, called the same way."""
    noise = [torch.Generator().manual_seed(0)]
    return pipe(PROMPT, generator=noise, **pipelines.settings(pipe, **kwargs)).images


class Log(Handler):
    """Every call, with its State, as it came."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, State]] = []

    def after(self, call: Call, state: State) -> None:
        self.calls.append((call, state))


class Mute(Handler):
    """Values of some rows become zero in some kinds of attention."""

    def __init__(self, rows: str, kinds: tuple[str, ...] = ("cross", "joint")) -> None:
        self.rows, self.kinds = rows, kinds

    def before(self, call: Call) -> Call | None:
        assert call.denoising is not None and call.denoising.rows is not None
        own = call.denoising.rows if self.rows == "conditional" else ~call.denoising.rows
        if call.site.kind not in self.kinds:
            return None
        return call.change(v=call.v * ~own[:, None, None, None])


def fingerprint(pipe: Any) -> list[str]:
    model = denoiser(pipe)
    return [
        f"{n} {m.training} {len(m._forward_hooks)} {len(m._forward_pre_hooks)} "
        f"{len(m._forward_hooks_always_called)} {sorted(m.__dict__)} {sorted(m._modules)} "
        f"{id(getattr(m, 'processor', None))}"
        for n, m in model.named_modules()
    ] + sorted(vars(pipe))


# -- the same images -------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_off_is_off(pipe: Any, guidance: float) -> None:
    want = plain(pipe, guidance_scale=guidance)
    assert np.abs(run(pipe, guidance_scale=guidance) - want).max() < 1e-5
    assert np.abs(run(pipe, Log(), guidance_scale=guidance) - want).max() < 1e-5
    pictures = partial(plain, pipe, guidance_scale=guidance, output_type="pil")
    watched = run(pipe, Log(), guidance_scale=guidance, output_type="pil")
    assert watched[0].tobytes() == pictures()[0].tobytes()


def test_no_trace(pipe: Any) -> None:
    weights = copy.deepcopy(denoiser(pipe).state_dict())
    want = plain(pipe)  # the pipeline keeps the settings of its first call
    before, random = fingerprint(pipe), torch.random.get_rng_state()
    with Session(pipe, [Log()]), Session(pipe, [Log()]):
        run(pipe)
    with pytest.raises(KeyError), Session(pipe), Session(denoiser(pipe)):
        run(pipe, Failing())
    assert fingerprint(pipe) == before
    assert np.array_equal(plain(pipe), want)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(weights[n], w) for n, w in denoiser(pipe).state_dict().items())


class Failing(Handler):
    def after(self, call: Call, state: State) -> None:
        raise KeyError


class Interrupted(Handler):
    def before(self, call: Call) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_an_interrupt_leaves_the_attention_of_others_alone(kind: str) -> None:
    from torch.overrides import _get_current_function_mode_stack

    pipe, x = tiny_pipeline(kind), torch.ones(1, 1, 2, 4)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, Interrupted())
    assert not _get_current_function_mode_stack()
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
    method = Interrupted()
    session = Session(pipe, [method]).attach()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            plain(pipe)
        assert len(_get_current_function_mode_stack()) == 1, "a new run ends what the last left on"
    session.detach()


def test_a_copy_made_in_a_session_is_plain(sd: Any) -> None:
    noise = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, sd.unet.config.cross_attention_dim)
    with torch.no_grad():
        want = sd.unet(*noise).sample
        with Session(sd, [log := Log()]):
            other = copy.deepcopy(sd.unet)
            assert torch.equal(other(*noise).sample, want)
    assert torch.equal(other(*noise).sample, want)
    assert not log.calls


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_sizes_that_are_not_square(pipe: Any, size: tuple[int, int]) -> None:
    log = Log()
    kwargs = {"height": size[0], "width": size[1]}
    assert np.abs(run(pipe, log, **kwargs) - plain(pipe, **kwargs)).max() < 1e-5
    grids = {c.denoising.grid for c, _ in log.calls}
    assert None not in grids
    assert all(h * size[1] == w * size[0] for h, w in grids)


def test_odd_latents_of_a_unet(sd: Any) -> None:
    log = Log()
    with torch.no_grad(), Session(sd.unet, [log]):
        sd.unet(torch.randn(1, 4, 19, 14), 5, torch.randn(1, 24, 32))
    assert {c.denoising.grid for c, _ in log.calls} == {(19, 14), (10, 7), (5, 4)}
    assert all(c.denoising.grid[0] * c.denoising.grid[1] == c.q.shape[2] for c, _ in log.calls)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_fused_projections_keep_working(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    if kind == "sd3":  # diffusers cannot fuse the second attention of SD 3.5
        config = {**pipe.transformer.config, "dual_attention_layers": ()}
        pipe.transformer = type(pipe.transformer).from_config(config).eval()
    denoiser(pipe).fuse_qkv_projections()
    want, before = plain(pipe), fingerprint(pipe)
    assert np.abs(run(pipe, Log()) - want).max() < 1e-5
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
def test_processors_that_compute_by_hand_give_way_and_come_back(name: str) -> None:
    from diffusers.models import attention_processor

    pipe = tiny_pipeline("sd")
    kind = getattr(attention_processor, name)
    pipe.unet.set_attn_processor(kind(2) if name.startswith("Sliced") else kind())
    want, before, log = plain(pipe), fingerprint(pipe), Log()
    assert np.abs(run(pipe, log) - want).max() < 1e-5
    assert log.calls and fingerprint(pipe) == before
    assert all(type(p) is kind for p in pipe.unet.attn_processors.values())


def test_a_users_processor_stays_in_place(sd: Any) -> None:
    pipe = tiny_pipeline("sd")
    own = HalfContext()
    pipe.unet.set_attn_processor(own)
    want = plain(pipe)
    assert np.abs(run(pipe, Log()) - want).max() < 1e-5
    assert np.abs(want - plain(sd)).max() > 1e-3
    assert all(p is own for p in pipe.unet.attn_processors.values())


def louder(kind: str) -> Any:
    """A user's own processor of joint attention: the stock one, on an image of twice the size."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    stock: Any = {"sd3": JointAttnProcessor2_0, "flux": FluxAttnProcessor}[kind]

    class Louder(stock):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(attn, 2 * hidden_states, *args, **kwargs)

    return Louder()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_users_processor_of_joint_attention_stays_in_place(kind: str) -> None:
    pipe, stock = tiny_pipeline(kind), plain(tiny_pipeline(kind))
    own = louder(kind)
    for _, module in door._attention_modules(pipe.transformer):
        module.set_processor(own)
    want, before, log = plain(pipe), fingerprint(pipe), Log()
    assert np.abs(run(pipe, log) - want).max() < 1e-5
    assert np.abs(want - stock).max() > 1e-3
    assert log.calls and fingerprint(pipe) == before


class HalfContext:
    """A user's own attention: the same, of half the context."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states / 2
        split = [
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        ]
        out = torch.nn.functional.scaled_dot_product_attention(*split)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class ByHand:
    """A user's own attention that asks nobody."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return attn.to_out[0](attn.to_v(hidden_states))


class Twice(HalfContext):
    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        twice = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        twice = torch.nn.functional.scaled_dot_product_attention(q, q, twice)
        return attn.to_out[0](twice.transpose(1, 2).flatten(2))


def test_processors_that_compute_something_else_are_refused_by_name() -> None:
    pipe = tiny_pipeline("sd")
    processors = dict(pipe.unet.attn_processors)
    name = next(n for n in processors if "attn1" in n)
    pipe.unet.set_attn_processor({**processors, name: ByHand()})
    with pytest.raises(ReachError, match="ByHand"):
        Session(pipe)
    pipe.unet.set_attn_processor({**processors, name: Twice()})
    with pytest.raises(ReachError, match=r"Twice.* asked for 2 attentions"):
        run(pipe, Log())
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe.unet.set_attn_processor(
        {**processors, name: IPAdapterAttnProcessor2_0(16, cross_attention_dim=32)}
    )
    with pytest.raises(ReachError, match="IPAdapterAttnProcessor2_0"):
        Session(pipe)


def test_projections_of_a_lora_are_used(sd: Any) -> None:
    """The door never touches weights: what peft puts around a projection runs as it is."""
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline("sd")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    want = plain(pipe)
    assert np.abs(want - plain(sd)).max() > 1e-4
    assert np.abs(run(pipe, Log()) - want).max() < 1e-5


# -- halves, steps, elements -----------------------------------------------------------------------
def test_halves_of_guidance_never_mix(sd: Any) -> None:
    """Silencing the text of one half is the same as giving that half's text alone no voice."""
    log = Log()
    run(sd, log, guidance_scale=5.0)
    for call, _ in log.calls:
        assert call.denoising.rows.tolist() == [False, True]
        assert call.denoising.conditional.tolist() == [1]
    both = run(sd, Mute("conditional"), Mute("unconditional"), guidance_scale=5.0)
    one = run(sd, Mute("conditional"), guidance_scale=5.0)
    other = run(sd, Mute("unconditional"), guidance_scale=5.0)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - both).max() > 1e-3
    # with both silent the halves are alike, so guidance has nothing to add
    alone = run(sd, Mute("conditional"), guidance_scale=1.0)
    assert np.abs(both - alone).max() < 1e-4


def guidance(pipe: Any) -> dict[str, Any]:
    """What turns guidance on: Flux's own is a number that the model reads, and true is a second
    forward.
    """
    true = type(pipe).__name__.startswith("Flux")
    return {"negative_prompt": "a star", "true_cfg_scale" if true else "guidance_scale": 4.0}


def test_what_is_done_to_one_half_does_not_reach_the_other(pipe: Any) -> None:
    """Within a step, before guidance brings both together."""

    def queries(log: Log) -> dict[bool, list[torch.Tensor]]:
        found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for call, _ in log.calls:
            if call.denoising.step == 0:
                for row, driven in enumerate(call.denoising.rows.tolist()):
                    found[driven].append(call.q[row])
        return found

    logs = {name: Log() for name in ("plain", "conditional", "unconditional")}
    run(pipe, logs["plain"], **guidance(pipe))
    want = queries(logs["plain"])
    assert len(want[True]) == len(want[False]) > 0
    for name, own in (("conditional", True), ("unconditional", False)):
        run(pipe, Mute(name), logs[name], **guidance(pipe))
        got = queries(logs[name])
        # one kernel call holds both rows, so the other may move in its last digit
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got[not own], want[not own]))
        assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got[own], want[own]))


def test_the_conditional_half_is_what_runs_without_guidance(pipe: Any) -> None:
    """Step 0 sees the same latents with and without guidance: the half must be the same call."""
    with_, without = Log(), Log()
    guided = guidance(pipe)
    run(pipe, with_, **guided)
    run(pipe, without, **({"guidance_scale": 1.0} if "guidance_scale" in guided else {}))
    ours = [
        c.q[c.denoising.conditional]
        for c, _ in with_.calls
        if c.denoising.step == 0 and len(c.denoising.conditional)
    ]
    theirs = [c.q for c, _ in without.calls if c.denoising.step == 0]
    assert len(ours) == len(theirs)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))


def test_steps_and_runs_are_counted(pipe: Any) -> None:
    log = Log()
    with Session(pipe, [log]):
        run(pipe, num_inference_steps=3)
        run(pipe, num_inference_steps=2)
    seen = list(dict.fromkeys((c.denoising.run, c.denoising.step) for c, _ in log.calls))
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    times = [c.denoising.timestep for c, _ in log.calls if c.denoising.run == 0]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3


def test_true_guidance_of_flux_is_two_forwards_of_one_step() -> None:
    pipe, log = tiny_pipeline("flux"), Log()
    run(pipe, log, negative_prompt="a star", true_cfg_scale=3.0)
    seen = list(
        dict.fromkeys((c.denoising.step, tuple(c.denoising.rows.tolist())) for c, _ in log.calls)
    )
    assert seen == [(0, (True,)), (0, (False,)), (1, (True,)), (1, (False,))]
    assert {c.denoising.prompts.text(0) for c, _ in log.calls} == {PROMPT}


def test_batch_is_alone(pipe: Any) -> None:
    prompts = [PROMPT, "a green star"]
    together = run(pipe, Log(), prompt=prompts)
    alone = [run(pipe, Log(), prompt=p, seed=n) for n, p in enumerate(prompts)]
    assert np.abs(together - np.concatenate(alone)).max() < 1e-4


def test_prompts_and_images_per_prompt(pipe: Any) -> None:
    log = Log()
    run(pipe, log, prompt=[PROMPT, "a green star"], num_images_per_prompt=2)
    place = log.calls[-1][0].denoising
    assert len(place.conditional) == 4
    assert [place.prompts.text(n) for n in range(4)] == [PROMPT] * 2 + ["a green star"] * 2
    again = place.prompts.encode(["a green star"])[0]
    assert torch.allclose(again, place.prompts.embeds[3], atol=1e-5)


def test_a_denoiser_alone(sd: Any) -> None:
    log = Log()
    sample, text = torch.randn(3, 4, 16, 16), torch.randn(3, 24, 32)
    with torch.no_grad():
        want = sd.unet(sample, 5, text).sample
        with Session(sd.unet, [log]):
            assert torch.allclose(sd.unet(sample, 5, text).sample, want, atol=1e-5)
    place = log.calls[-1][0].denoising
    assert place.conditional.tolist() == [0, 1, 2] and place.prompts is None
    # both halves of guidance without the pipeline that says which is which
    with torch.no_grad(), Session(sd.unet, [log := Log()]):
        sd.unet(torch.cat([sample[:1]] * 2), 5, text[:2])
    with pytest.raises(InputError, match="pass the whole pipeline"):
        _ = log.calls[0][0].denoising.conditional


def test_masks_of_the_text_are_followed(sd: Any) -> None:
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32)
    mask = torch.ones(2, 24)
    mask[0, 9:] = 0
    with torch.no_grad():
        want = sd.unet(sample, 5, text, encoder_attention_mask=mask).sample
        with Session(sd.unet, [log := Log()]):
            got = sd.unet(sample, 5, text, encoder_attention_mask=mask).sample
        assert torch.allclose(got, want, atol=1e-5)
        assert not torch.allclose(want, sd.unet(sample, 5, text).sample, atol=1e-3)
    assert log.calls[1][0].bias is not None


# -- segments and columns --------------------------------------------------------------------------
def test_segments(pipe: Any) -> None:
    log = Log()
    run(pipe, log, width=48)
    for call, _ in log.calls:
        place = call.denoising
        tokens = place.image.stop - place.image.start
        assert place.grid[0] * place.grid[1] == tokens
        if call.site.kind == "joint":
            text = place.text.stop - place.text.start
            assert text + tokens == call.q.shape[2] == call.k.shape[2]
            assert text == place.prompts.embeds.shape[1]
        elif call.site.kind == "cross":
            assert place.text == slice(0, call.k.shape[2])
        else:
            assert place.text is None


def test_text_columns_are_where_the_text_is(pipe: Any) -> None:
    """A change of the text's third token moves that key alone in the first attention to text."""
    logs = [Log(), Log()]

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        text = kwargs["encoder_hidden_states"].clone()
        text[:, 3] += 1
        return args, kwargs | {"encoder_hidden_states": text}

    run(pipe, logs[0], num_inference_steps=1)
    hook = denoiser(pipe).register_forward_pre_hook(change, with_kwargs=True)
    run(pipe, logs[1], num_inference_steps=1)
    hook.remove()
    one, two = (next(c for c, _ in log.calls if c.denoising.text) for log in logs)
    moved = (one.k - two.k).abs().amax((0, 1, 3)) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == [one.denoising.text.start + 3]
    joint = one.site.kind == "joint"
    image, text = one.denoising.image, one.denoising.text
    covered = {*range(image.start, image.stop), *range(text.start, text.stop)}
    assert not joint or covered == set(range(one.q.shape[2]))


def test_columns_equal_the_explicit_map(pipe: Any) -> None:
    log = Log()
    run(pipe, log, width=48, num_inference_steps=1)
    for call, state in log.calls:
        if call.denoising.text is None:
            continue
        place = call.denoising
        keys = place.prompts.columns(0, *_span(PROMPT, "circle"))
        scores = call.scale * call.q.double() @ call.k.double().transpose(-1, -2)
        want = scores.softmax(-1)[:, :, place.image][..., [place.text.start + k for k in keys]]
        got = columns(call, state, keys)
        assert torch.allclose(got.double(), want, atol=1e-6)


def test_columns_carry_gradients(sd: Any) -> None:
    """d column / d text through the lse and the score equals that of the explicit map."""
    text = torch.randn(1, 24, 32, requires_grad=True)
    sample = torch.randn(1, 4, 16, 16)
    got: list[torch.Tensor] = []
    want: list[torch.Tensor] = []

    class Both(Handler):
        def after(self, call: Call, state: State) -> None:
            if call.site.kind == "cross":
                got.append(columns(call, state, [3]).square().sum())
                scores = call.scale * call.q @ call.k.transpose(-1, -2)
                want.append(scores.softmax(-1)[..., 3].square().sum())

    with Session(sd.unet, [Both()]):
        sd.unet(sample, 5, text)
    (one,) = torch.autograd.grad(torch.stack(got).sum(), text, retain_graph=True)
    (two,) = torch.autograd.grad(torch.stack(want).sum(), text)
    assert float(two.abs().max()) > 1e-4
    assert torch.allclose(one, two, atol=1e-5)


def _span(text: str, word: str) -> tuple[int, int]:
    return text.index(word), text.index(word) + len(word)


def test_columns_of_words(sd: Any) -> None:
    log = Log()
    run(sd, log, prompt="A  red zebra, and a circle")
    prompts = log.calls[0][0].denoising.prompts
    text = prompts.text(0)
    ids = sd.tokenizer(text).input_ids
    for word in ("red", "zebra", "circle"):
        own = prompts.columns(0, *_span(text, word))
        assert sd.tokenizer.decode([ids[n] for n in own]).replace(" ", "") == word
    assert len(prompts.columns(0, *_span(text, "zebra"))) == 5
    long = "a red circle and " * 6 + "a star"
    run(sd, log, prompt=long)
    prompts = log.calls[-1][0].denoising.prompts
    with pytest.raises(InputError, match="'star' lies behind the 24 tokens"):
        prompts.columns(0, *_span(long, "star"))


def test_words_have_columns_in_both_encoders_of_sd3() -> None:
    pipe, log = tiny_pipeline("sd3"), Log()
    run(pipe, log)
    prompts = log.calls[0][0].denoising.prompts
    clip, t5 = prompts.columns(0, *_span(PROMPT, "circle"))
    assert pipe.tokenizer.decode([pipe.tokenizer(PROMPT).input_ids[clip]]).strip() == "circle"
    assert pipe.tokenizer_3.decode([pipe.tokenizer_3(PROMPT).input_ids[t5 - 24]]) == "circle"


def test_projection_is_the_modules_own(sd: Any) -> None:
    """The same context gives the call's own keys and values, through fused projections too."""
    for fuse in (False, True):
        pipe = tiny_pipeline("sd")
        if fuse:
            pipe.unet.fuse_qkv_projections()
        seen = 0

        class Check(Handler):
            def after(self, call: Call, state: State) -> None:
                nonlocal seen
                place = call.denoising
                if call.site.kind == "cross":
                    k, v = place.project(place.prompts.embeds)
                    row = place.conditional
                    assert torch.allclose(k, call.k[row], atol=1e-6)
                    assert torch.allclose(v, call.v[row], atol=1e-6)
                    seen += 1
                else:
                    assert place.project is None

        run(pipe, Check())
        assert seen


# -- refusals --------------------------------------------------------------------------------------
def test_other_models_are_refused_by_name() -> None:
    import diffusers

    with pytest.raises(ReachError, match="AutoencoderKL is not reached"):
        regard.watch(tiny_pipeline("sd").vae)
    with pytest.raises(ReachError, match="UNet1DModel asks for no softmax attention"):
        Session(diffusers.UNet1DModel(block_out_channels=(8, 8, 16), extra_in_channels=16))


def test_facts_of_a_pipeline(pipe: Any) -> None:
    with torch.no_grad(), regard.watch(pipe, facts=["entropy", "received"]) as seen:
        run(pipe, num_inference_steps=1)
    part = seen.parts[0]
    entropy = seen["entropy"][part][0]
    assert entropy.dtype == torch.float32 and bool(torch.isfinite(entropy).all())
    log = Log()
    run(pipe, log, num_inference_steps=1)
    call, _ = next((c, s) for c, s in log.calls if c.site.part == part and c.site.layer == 0)
    p = (call.scale * call.q.double() @ call.k.double().transpose(-1, -2)).softmax(-1)
    assert torch.allclose(seen["received"][part][0].double(), p.sum(-2), atol=1e-4)
    assert torch.allclose(entropy.double(), -(p * p.log()).sum(-1), atol=1e-4)


def test_the_two_encoders_of_sdxl_share_their_columns() -> None:
    pipe, log = tiny_pipeline("sdxl"), Log()
    assert np.abs(run(pipe, log) - plain(pipe)).max() < 1e-5
    place = log.calls[-1][0].denoising
    assert place.prompts.columns(0, *_span(PROMPT, "circle")) == [3]
    assert place.prompts.embeds.shape[-1] == 64 and place.rows.tolist() == [False, True]
    # not the first phrase: a causal encoder reads it alike alone and in the prompt
    changed = run(pipe, regard.StructuredDiffusion(phrases=["a blue square"]))
    explicit = run(pipe, regard.StructuredDiffusion(phrases=["a blue square"], fused=False))
    assert np.abs(changed - explicit).max() < 2e-5
    assert np.abs(changed - plain(pipe)).max() > 1e-3


def test_a_session_that_cannot_begin_leaves_no_trace(sd: Any) -> None:
    pipe = tiny_pipeline("sd")
    session, before = Session(pipe, [Log()]), fingerprint(pipe)
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    own = module.processor
    module.processor = ByHand()
    with pytest.raises(ReachError, match="ByHand"):
        session.attach()
    module.processor = own
    assert fingerprint(pipe) == before
