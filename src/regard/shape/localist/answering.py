"""One question about documents, answered at dial 0 and at the dial, with the figures of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regard.watching import apply
from regard.watching.tokens import reader
from regard.zoo.options import placed

from .calibrate import calibrate_dial, read_dial
from .card import Settings
from .method import LocalityDial
from .prompt import Prompt, with_documents


def greedy(model: Any, prompt: Prompt, tokens: int, dial: LocalityDial | None = None) -> list[int]:
    """Ids of the greedy answer."""
    with torch.no_grad(), apply(model, *([dial] if dial else [])):
        out = model.generate(**prompt.inputs, max_new_tokens=tokens, do_sample=False)
    new: list[int] = out[0, prompt.ids.shape[1] :].tolist()
    return new


def answered(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    *,
    documents: Mapping[str, str],
    question: str,
    toward: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
    tokens: int = 24,
    leakage: float | None = None,
    chat: bool = True,
) -> dict[str, Any]:
    """Answers and figures at dial 0 and at the dial; plain data.

    Figures are of the prompt and of the answer that each setting gave, in one pass over both.

    Args:
        leakage: a target, for which the strength is found in place of `settings.beta`.
    """
    tokenizer = reader(tokenizer)
    prompt = with_documents(tokenizer, documents, question, chat=chat, device=model.device)
    given = {**settings.settings(), "blocks": prompt.blocks, "toward": list(toward) or None}
    given["check"] = True
    dial = LocalityDial(**given, metadata=metadata or {})
    calibrated = None
    if leakage is not None:
        found = calibrate_dial(model, dial, [prompt.inputs], target=leakage)
        calibrated = found.as_dict()
        given["beta"] = dial.beta
    result: dict[str, Any] = {
        "method": "localist",
        "settings": {n: v for n, v in dial.settings().items() if n != "blocks"},
        "loaded": placed(model),
        "question": question,
        "toward": list(toward),
        "locality": dial.locality,
        "beta": dial.beta,
        "prompt_tokens": prompt.ids.shape[1],
        "calibration": calibrated,
        "figures": [],
    }
    for name, locality in (("plain", 0.0), ("dialled", dial.locality)):
        one = LocalityDial(**{**given, "locality": locality}, metadata=metadata or {})
        new = greedy(model, prompt, tokens, one)
        whole = torch.cat([prompt.ids, prompt.ids.new_tensor([new])], 1)
        report = read_dial(model, one, input_ids=whole)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        said = tokenizer.decode([n for n in new if n not in ends])
        result[name] = {"answer": said, "report": report}
        result["figures"].append({"locality": locality, **report["outside"]})
    return result
