"""The process that measures one cell: JSON jobs in, seconds and peak memory out, line by line.

Started by path, so that the Python of a peer can run it too: regard is imported only by the routes
that need it. Answers go to the original stdout; whatever a library prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
Job = dict[str, Any]


def _peers() -> Any:
    if __name__ != "__main__":
        from . import peers

        return peers
    spec = importlib.util.spec_from_file_location("bench_peers", _HERE / "peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Memory:
    """Resident memory of this process: now, and its peak since `reset`, in bytes.

    Linux keeps the peak (VmHWM) and lets a process reset its own; elsewhere the peak is that of the
    whole life of the process (`ru_maxrss`), which a fresh process per cell makes good enough.
    """

    @staticmethod
    def _status(name: str) -> int | None:
        try:
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return None

    @classmethod
    def now(cls) -> int:
        resident = cls._status("VmRSS")
        return cls.peak() if resident is None else resident

    @classmethod
    def peak(cls) -> int:
        highest = cls._status("VmHWM")
        if highest is not None:
            return highest
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @classmethod
    def reset(cls) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)  # what loading left in the heap is given back first
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# -- routes: forward(ids, **kwargs) of a model -----------------------------------------------------
def plain(model: Any) -> Callable[..., Any]:
    """The model as it is, with torch's fused attention."""
    return lambda ids, **kwargs: model(ids, **kwargs)


def watch(model: Any, facts: list[str]) -> Callable[..., Any]:
    """The model under `regard.watch`, results read."""
    import regard

    def forward(ids: Any, **kwargs: Any) -> Any:
        with regard.watch(model, facts=facts) as seen:
            out = model(ids, **kwargs)
        return out, [dict(seen[fact]) for fact in facts]

    return forward


def eager(model: Any) -> Callable[..., Any]:
    """The usual way: `output_attentions=True`, every map kept until the end, then reduced."""
    reduce = _peers().reduce

    def forward(ids: Any, **kwargs: Any) -> Any:
        model.set_attn_implementation("eager")
        try:
            out = model(ids, output_attentions=True, **kwargs)
            return [reduce(p) for p in out.attentions]
        finally:
            model.set_attn_implementation("sdpa")

    return forward


def eager_lean(model: Any) -> Callable[..., Any]:
    """The careful way: eager attention with hooks that reduce each map and let it go."""
    from regard.reach.transformers import sites

    reduce = _peers().reduce
    modules = dict(model.named_modules())

    def forward(ids: Any, **kwargs: Any) -> Any:
        facts: list[Any] = []

        def hook(module: Any, args: Any, output: Any) -> Any:
            facts.append(reduce(output[1]))
            return (output[0], None, *output[2:])

        hooks = [modules[site.name].register_forward_hook(hook) for site in sites(model)]
        model.set_attn_implementation("eager")
        try:
            model(ids, **kwargs)
        finally:
            model.set_attn_implementation("sdpa")
            for h in hooks:
                h.remove()
        return facts

    return forward


def route(model: Any, job: Job) -> Callable[..., Any]:
    """The forward that a job names."""
    name = job["route"]
    if name == "watch":
        return watch(model, job["facts"])
    if name == "peer":
        forward: Callable[..., Any] = _peers().prepare(job["peer"], model)
        return forward
    return {"plain": plain, "eager": eager, "eager_lean": eager_lean}[name](model)


# -- jobs ------------------------------------------------------------------------------------------
class Bench:
    """What one process keeps between its jobs."""

    def __init__(self, setup: Job) -> None:
        import torch

        torch.set_num_threads(setup["threads"])
        torch.manual_seed(setup["seed"])
        self.setup = setup
        self.model: Any = None
        self.ids: Any = None
        self.ready: dict[str, Callable[..., Any]] = {}

    def do(self, job: Job) -> Job:
        """One job: "about" the model, a "forward" of it, or "kernel" calls on random tensors."""
        import torch

        with torch.no_grad():
            answer: Job = getattr(self, "_" + job["do"])(job)
        return answer

    def _load(self) -> None:
        if self.model is not None:
            return
        import torch

        if self.setup.get("own", True):
            from regard.zoo.options import Loading

            loading = Loading(device="cpu", **self.setup.get("loading", {}))
            self.model, self.tokenizer = loading.load(self.setup["model"])
            if getattr(self.model.config, "_attn_implementation", "sdpa") != "sdpa":
                self.model.set_attn_implementation("sdpa")
        else:
            from transformers import AutoModelForCausalLM

            given = {"dtype": torch.float32, **self.setup.get("loading", {})}
            pickled = given.pop("allow_pickle", False)
            self.model = AutoModelForCausalLM.from_pretrained(
                self.setup["model"],
                attn_implementation="sdpa",
                use_safetensors=None if pickled else True,
                **given,
            ).eval()
        if self.setup.get("ids"):
            tokens = json.loads(Path(self.setup["ids"]).read_text(encoding="ascii"))
            self.ids = torch.tensor(tokens)[None]

    def _about(self, job: Job) -> Job:
        """Shape and place of the model, and token ids: a shipped text, or random ones."""
        import torch

        self._load()
        longest = job["tokens"]
        ids: list[int] = []
        if self.tokenizer is not None and hasattr(self.tokenizer, "encode"):
            from regard import zoo

            ids = self.tokenizer.encode(zoo.text(zoo.texts()[0]))
        text = bool(ids)
        if not ids:
            ids = torch.randint(self.model.config.get_text_config().vocab_size, (longest,)).tolist()
        config = self.model.config.get_text_config()
        return {
            "path": self.model.name_or_path,
            "ids": (ids * -(-longest // len(ids)))[:longest],
            "text": text,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
            "positions": getattr(config, "max_position_embeddings", None),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _forward(self, job: Job) -> Job:
        self._load()
        kwargs = {"logits_to_keep": 1} if job["logits"] == "last" else {}
        name = json.dumps([job[k] for k in ("route", "facts", "peer") if k in job])
        if name not in self.ready:
            self.ready[name] = route(self.model, job)
            self.ready[name](self.ids[:, :16], **kwargs)  # imports, thread pools, lazy tables
        forward, ids = self.ready[name], self.ids[:, : job["tokens"]]
        if job.get("memory"):
            Memory.reset()
        before = Memory.now()
        start = time.perf_counter()
        result = forward(ids, **kwargs)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "total": Memory.peak(), "growth": Memory.peak() - before}
        del result
        if job.get("peer"):
            answer["peer_version"] = _peers().version(job["peer"])
        return answer

    def _kernel(self, job: Job) -> Job:
        """Rounds of every operation on the same random q, k, v: seconds by name."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        from regard.core import FACTS, Mask, attend, entropy, measure, received

        torch.manual_seed(self.setup["seed"])
        n, dim = job["tokens"], job["head_dim"]
        q = torch.randn(1, job["heads"], n, dim)
        k, v = (torch.randn(1, job["kv_heads"], n, dim) for _ in range(2))
        mask = Mask.causal()
        lse = attend(q, k, v, mask=mask).lse
        facts = [FACTS[name]() for name in job["facts"]]

        def watched(*, want_entropy: bool) -> None:
            state = attend(q, k, v, mask=mask)
            received(q, k, state.lse, mask=mask)
            if want_entropy:
                entropy(q, k, state.lse, mask=mask)

        operations: dict[str, Callable[[], Any]] = {
            "sdpa": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
            "attend": lambda: attend(q, k, v, mask=mask),
            "received": lambda: received(q, k, lse, mask=mask),
            "entropy": lambda: entropy(q, k, lse, mask=mask),
            "attend + received": lambda: watched(want_entropy=False),
            "all facts": lambda: [
                f.finish(s) for f, s in zip(facts, measure(q, k, lse, facts, mask=mask))
            ],
        }
        for run in operations.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in operations}
        for _ in range(job["repeats"]):
            for name, run in operations.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        return {"seconds": seconds}


def answer(bench: Bench, job: Job) -> Job:
    """The answer to a job; an error becomes an outcome with its reason."""
    try:
        return {"outcome": "measured", **bench.do(job)}
    except ModuleNotFoundError as problem:
        return {"outcome": "not installed", "reason": str(problem)}
    except MemoryError as problem:
        return {"outcome": "out of memory", "reason": str(problem) or "MemoryError"}
    except Exception as problem:  # whatever a peer or a model raises is a result, not a crash
        reason = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
        if type(problem).__name__ == "Unsupported":
            return {"outcome": "unsupported", "reason": str(problem)}
        if "allocate memory" in str(problem) or "not enough memory" in str(problem):
            return {"outcome": "out of memory", "reason": reason}
        return {"outcome": "failed", "reason": reason}


def main() -> None:
    """Serve jobs from stdin until it closes."""
    # the folder of this file would otherwise hide other packages named like our modules
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != _HERE]
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # only root may; a fairer clock on a shared machine
    with contextlib.suppress(OSError, AttributeError):
        os.nice(-15)
    with contextlib.suppress(OSError):
        # Linux groups processes by session, and nice counts only within a group
        Path("/proc/self/autogroup").write_text("-15", encoding="ascii")
    with contextlib.suppress(OSError):
        # if memory runs out, this process goes, not somebody else's
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    bench = Bench(json.loads(sys.argv[1]))
    for line in sys.stdin:
        channel.write(json.dumps(answer(bench, json.loads(line))) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
