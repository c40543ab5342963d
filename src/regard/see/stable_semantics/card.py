"""The card of StableSemantics."""

from regard.cards import Card, Paper

CARD = Card(
    slug="stable-semantics",
    name="StableSemantics",
    verb="see",
    does="build data of prompts, images and one attention map per noun phrase",
    paper=Paper(
        "StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations in Naturalistic Images",
        "Zawar et al.",
        2024,
        "2406.13735",
    ),
    families=(
        "UNet diffusion",
        "DiT diffusion",
    ),
    method="ChunkMaps",
    exports=("Recipe",),
    model="shapes-sd",
)
