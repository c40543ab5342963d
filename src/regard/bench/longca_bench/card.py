"""The card of LongCA-bench."""

from regard.cards import Card, Paper

CARD = Card(
    slug="longca-bench",
    name="LongCA-bench",
    verb="bench",
    does="one fair bench for kernels, masks and context parallelism",
    paper=Paper(
        "Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism",
        "Bu et al.",
        2025,
        "2510.17896",
    ),
    families=("any attention",),
)
