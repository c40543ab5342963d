"""The card of Deconstructed attention."""

from regard.cards import Card, Paper

CARD = Card(
    slug="deconstructed-attention",
    name="Deconstructed attention",
    verb="shape",
    does="swap attention for simpler mixers, layer by layer, and see what is needed",
    paper=Paper(
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        "Xue et al.",
        2025,
        "2510.11602",
    ),
    families=("causal LM",),
    exports=("MixerConfig", "MixerForCausalLM", "mixer_lm"),
    command="compare",
    examples=(
        "regard train lm --mixer standard,mlp,non_approximate --keep none,even --out runs",
        "regard train lm --attention softmax,k_bias,sigmoid_no_norm --fixed-token 2 --out sinks",
        "regard compare runs/mlp-seed0 runs/standard-seed0 --out compare.html",
    ),
)
