"""What every rank of `test_parallel` runs: tiny models watched on all ranks, and in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import regard
from regard.core import Thumbnail
from regard.core.parallel import Parallel, started
from regard.errors import RegardError
from regard.reach.parallel import prove
from regard.watching.parallel import SharedWatch

FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "qwen3_moe", "gpt_neox", "bert")
FACTS = ["received", "mean_received", "entropy", "distance", "waad", Thumbnail(cells=8)]
TOKENS = 45  # divides by no number of ranks, and is longer than the windows of the tiny models


def watched(family: str, scheme: str) -> float:
    model = regard.zoo.tiny(family)
    ids = torch.randint(3, 120, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    # BERT has no causal mask, so it shows that nothing here counts on one
    with torch.no_grad(), regard.watch(model, facts=FACTS) as alone:
        model(input_ids=ids)
    shared = SharedWatch(model, FACTS, ids, scheme=scheme, timeout=60).see()
    worst = 0.0
    for fact in alone.facts:
        for layer, want in alone[fact].items():
            found = shared[fact][layer]
            assert found.shape == want.shape, (fact, found.shape, want.shape)
            worst = max(worst, float((found - want).abs().max() / want.abs().max()))
    assert alone.causal == shared.causal
    some = SharedWatch(model, FACTS, ids, scheme=scheme, layers=[1], heads=[3, 1]).see()
    assert list(some["entropy"]) == [1]
    part = shared["entropy"][1][:, [3, 1]]
    return max(worst, float((some["entropy"][1] - part).abs().max()))


def refusals() -> dict[str, str]:
    found: dict[str, str] = {}
    ids = torch.arange(3, 43)[None]

    def ask(name: str, make: Any) -> None:
        try:
            make()
        except RegardError as error:
            found[name] = str(error)

    def see(model: Any, facts: Any = ("received",), **options: Any) -> Any:
        return SharedWatch(model, facts, ids, **options).see()

    tiny = regard.zoo.tiny
    ask("encoder-decoder", lambda: see(tiny("t5")))
    ask("fact", lambda: see(tiny("llama"), ["top"]))
    ask("scheme", lambda: see(tiny("llama"), scheme="rings"))
    ask("head", lambda: see(tiny("llama"), heads=[9]))
    stretched = tiny("llama")
    stretched.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ask("positions", lambda: see(stretched))
    mixing = tiny("llama")
    mixing.model.embed_tokens.register_forward_hook(lambda _, __, out: out + out.roll(1, 1))
    ask("mixing", lambda: see(mixing))
    broken = tiny("llama")
    with torch.no_grad():
        run = Parallel("ring", 40)
        assert prove(broken, run, ids) < 1e-4
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    ask("not finite", lambda: see(broken))
    return found


def main(path: Path) -> None:
    with started(timeout=60):
        schemes = ("ring", "ulysses", "usp", "allgather", "loongtrain")
        results: dict[str, Any] = {}
        for turn, family in enumerate(FAMILIES):
            scheme = schemes[turn % len(schemes)]
            results[f"{family} {scheme}"] = watched(family, scheme)
        results["refused"] = refusals()
        if dist.get_rank() == 0:
            path.write_text(json.dumps(results))


def memory() -> None:
    """MiB that seeing 4k tokens adds to the peak of this process."""
    import resource

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, vocab_size=128, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)  # the same weights on every rank
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 120, (1, 4096), generator=torch.Generator().manual_seed(3))

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    with started(timeout=120):
        SharedWatch(model, FACTS, ids[:, :256]).see()
        before = peak()
        SharedWatch(model, FACTS, ids).see()
        print(peak() - before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "memory":
        memory()
    else:
        main(Path(sys.argv[1]))
