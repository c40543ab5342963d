"""The card of Structured Diffusion Guidance."""

from regard.cards import Card, Paper

CARD = Card(
    slug="structured-diffusion",
    name="Structured Diffusion Guidance",
    verb="steer",
    does="give each noun phrase its own encoding, so colours stay on their objects",
    paper=Paper(
        "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis",
        "Feng et al.",
        2022,
        "2212.05032",
    ),
    families=("UNet diffusion",),
    method="StructuredDiffusion",
    model="shapes-sd",
)
