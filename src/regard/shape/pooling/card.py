"""The card of Pooling and attention."""

from regard.cards import Card, Paper

CARD = Card(
    slug="pooling",
    name="Pooling and attention",
    verb="shape",
    does="turn a decoder into a sentence encoder, and compare the designs fairly",
    paper=Paper(
        "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?",
        "Tang and Yang",
        2024,
        "2409.02727",
    ),
    families=(
        "causal LM",
        "text encoder",
    ),
)
