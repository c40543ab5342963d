"""TRL's GRPO with credit for tokens: advantages `[batch]` become `[batch, tokens]`.

`trainer_class()` gives the class. After completions are scored, one pass without gradients over
prompt and completion gives the weights; TRL's loss takes advantages per token. Generation may have
run elsewhere (vLLM). Needs the extra `rl` (`pip install "regard[rl]"`).
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

from .card import CreditSettings
from .credit import credit_weights

SIGNS = ("both", "positive", "negative")


@lru_cache(maxsize=1)
def trainer_class() -> Any:
    """`CreditGRPOTrainer`, made when TRL is needed; `from ...grpo import CreditGRPOTrainer` too.

    Raises:
        ImportError: TRL is not installed; names the extra.
    """
    try:
        from trl import GRPOTrainer
    except ImportError as problem:
        raise ImportError('reinforcement learning needs TRL: pip install "regard[rl]"') from problem

    class CreditGRPOTrainer(GRPOTrainer):
        """`GRPOTrainer` whose advantages are weighted by token.

        Args:
            credit: a `CreditSettings`, or the name of a credit: "coupled", "uniform", ...
            signs: advantages that are weighted: "both" (the paper's revision), "positive" (its
                first version) or "negative".
            args, kwargs: those of `GRPOTrainer`.
        """

        def __init__(
            self,
            *args: Any,
            credit: CreditSettings | str = "coupled",
            signs: str = "both",
            **kwargs: Any,
        ) -> None:
            self.credit = CreditSettings(credit) if isinstance(credit, str) else credit
            if signs not in SIGNS:
                raise InputError(f"signs is one of {', '.join(SIGNS)}, not {signs!r}")
            self.signs = signs
            super().__init__(*args, **kwargs)
            if self.loss_type == "vespo" or self.off_policy_mask_threshold is not None:
                raise InputError(
                    "credit by token goes with losses that use advantages by token: leave "
                    "loss_type='vespo' and off_policy_mask_threshold out"
                )
            if getattr(self.args, "use_liger_kernel", False):
                raise InputError(
                    "Liger's loss takes one advantage a row: leave use_liger_kernel out"
                )

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            made: dict[str, Any] = super()._generate_and_score_completions(inputs)
            start = time.perf_counter()
            made["advantages"] = self.credited(made)
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["credit/seconds"].append(time.perf_counter() - start)
            return made

        def credited(self, made: dict[str, Any]) -> Tensor:
            """Advantages `[batch, completion tokens]` of a batch of scored completions."""
            prompts, completions = made["prompt_ids"], made["completion_ids"]
            response = made["completion_mask"]
            if "tool_mask" in made:
                response = response * made["tool_mask"]
            ids = torch.cat([prompts, completions], 1)
            live = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
            response = torch.cat([torch.zeros_like(prompts), response], 1)
            model = self.accelerator.unwrap_model(self.model)
            size = max(1, int(self.args.per_device_train_batch_size))
            settings = self.credit.settings()
            parts = []
            for n in range(0, len(ids), size):
                at = slice(n, n + size)
                # truncated completions may be masked as a whole: such rows stay as they are
                some = response[at].any(-1)
                weights = torch.ones(ids[at].shape, device=ids.device)
                if bool(some.any()):
                    # rows alone: their padding is known, and masked ones have none to credit
                    weights[some] = credit_weights(
                        model, ids[at][some], response[at][some], attention_mask=live[at][some],
                        step=self.state.global_step * 4096 + n, **settings,
                    )  # fmt: skip
                parts.append(weights[:, prompts.shape[1] :])
            weights = torch.cat(parts)
            mode = "train" if self.model.training else "eval"
            mask = response[:, prompts.shape[1] :].bool()
            mean = weights[mask].mean() if bool(mask.any()) else weights.new_ones(())
            self._metrics[mode]["credit/mean"].append(float(mean))
            advantages: Tensor = made["advantages"][:, None]
            if self.signs == "positive":
                weights = torch.where(advantages >= 0, weights, 1.0)
            elif self.signs == "negative":
                weights = torch.where(advantages < 0, weights, 1.0)
            return advantages * weights.to(advantages.dtype)

    return CreditGRPOTrainer


def __getattr__(name: str) -> Any:
    if name == "CreditGRPOTrainer":
        return trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
