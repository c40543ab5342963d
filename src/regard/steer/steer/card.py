"""The card of STEER."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting

CARD = Card(
    slug="steer",
    name="STEER",
    verb="steer",
    does="write synthetic text that stays in its domain and does not repeat itself",
    paper=Paper(
        "Steering Language Generation: Harnessing Contrastive Expert Guidance and Negative Prompting for Coherent and Diverse Synthetic Data Generation",
        "O'Neill et al.",
        2023,
        "2308.07645",
    ),
    families=("causal LM",),
    method="ContrastiveExpertGuidance",
    neutral={"gamma": 0.0, "eta": 0.0},
    examples=(
        "regard run steer --negatives seen.txt --gamma 0.5 --eta 0.2 -n 20 --out synth.jsonl",
        'regard run steer --expert my-lora --base my-model --prompt "Review:" --eta 0',
    ),
)


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    gamma: float = setting(0.5, "strength of the expert's lead over the base", least=0)
    eta: float = setting(
        0.2, "strength of the push away from the negatives; near 1 text falls apart", least=0
    )
    alpha: float = setting(
        0.0,
        "only tokens at least so many times as likely as the expert's best; 0.05 to 0.1 with a "
        "large eta, 0 is off",
        least=0,
        below=1,
    )
    k: int = setting(10, "examples in a negative prompt", least=1)
    seed: int = setting(0, "seed of the draws", least=0)
