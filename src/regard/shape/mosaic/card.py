"""The card of MOSAIC."""

from regard.cards import Card, Paper

CARD = Card(
    slug="mosaic",
    name="MOSAIC",
    verb="shape",
    does="teach a diffusion transformer where each reference subject belongs",
    paper=Paper(
        "MOSAIC: Multi-Subject Personalized Generation via Correspondence-Aware Alignment and Disentanglement",
        "She et al.",
        2025,
        "2509.01977",
    ),
    families=("DiT diffusion",),
)
