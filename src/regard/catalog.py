"""The table behind `regard methods`: every method, its paper, and how far it has come here.

`python -m regard.catalog FILE` writes the table as a page; without FILE it prints it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from regard.files import write_text
from regard.report.document import Page, Section
from regard.report.table import Cell, Table

VERBS: dict[str, str] = {
    "see": "exact facts and pictures of attention at any length",
    "steer": "better answers or images from the same weights, no training",
    "shrink": "the same answers with less memory and time",
    "shape": "new attention, trained: layers, losses, heads, models",
    "bench": "which kernel, mask and parallel scheme is fastest here",
}
"""The verbs, and what a person gets from each."""

VERDICTS = ("reproduced", "partly", "not reproduced", "needs scale")


@dataclass(frozen=True)
class Method:
    """One method: its card's slug, what it does, the models it is for, and its paper.

    `home` is its module under the verb, where that is not named like the slug.
    """

    slug: str
    name: str
    verb: str
    what: str
    families: tuple[str, ...]
    title: str
    authors: str
    year: int
    arxiv: str
    home: str = ""

    @property
    def module(self) -> str:
        """Return the module that implements the method, whether it exists yet or not."""
        return f"regard.{self.verb}.{self.home or self.slug.replace('-', '_')}"

    @property
    def status(self) -> str:
        """Return "available" if the implementing module is there, else "planned"."""
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:  # the package of the verb itself is still to come
            found = None
        return "available" if found else "planned"

    @property
    def url(self) -> str:
        """Return the address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def reproduction(self) -> str:
        """Return what our own measurements say of the paper's claims, "-" where there are none."""
        package = Path(__file__).resolve().parent
        for folder in (package / "reproductions", package.parents[1] / "reproductions"):
            file = folder / f"{self.slug}.json"
            if file.is_file():
                return _verdict(json.loads(file.read_text(encoding="utf-8")))
        return "-"


def _verdict(result: dict[str, object]) -> str:
    """Sum up a result file: how many claims got which verdict.

    >>> _verdict({"claims": [{"verdict": "partly"}, {"verdict": "reproduced"}]})
    '1 reproduced, 1 partly'
    """
    claims = result.get("claims")
    if not isinstance(claims, list):
        return str(result.get("verdict", "-"))
    counts = Counter(claim.get("verdict") for claim in claims if isinstance(claim, dict))
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "-"


_LM = "causal LM"
_VLM = "vision-language"
_ENCODER = "text encoder"
_VIT = "ViT"
_UNET = "UNet diffusion"
_DIT = "DiT diffusion"
_ANY = "any attention"

_METHODS = (
    Method(
        "sink-emergence",
        "Sink emergence",
        "see",
        "measure attention sinks, and see where they appear, move or vanish",
        (_LM, _ANY),
        "When Attention Sink Emerges in Language Models: An Empirical View",
        "Gu et al.",
        2024,
        "2410.10781",
    ),
    Method(
        "preplan-anchor",
        "Preplan and anchor",
        "see",
        "read the rhythm of an answer from attention, and credit the tokens that carry it",
        (_LM,),
        "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained "
        "Policy Optimization",
        "Li et al.",
        2025,
        "2510.13554",
    ),
    Method(
        "cross-attention-explanation",
        "Cross-attention explanation",
        "see",
        "measure how much of a speech model's behaviour its cross-attention explains",
        ("speech", "encoder-decoder"),
        "Cross-Attention is Half Explanation in Speech-to-Text Models",
        "Papi et al.",
        2025,
        "2509.18010",
    ),
    Method(
        "refam",
        "RefAM",
        "see",
        "point at what a phrase refers to, from a diffusion transformer's attention",
        (_DIT,),
        "RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
        "Kukleva et al.",
        2025,
        "2509.22650",
    ),
    Method(
        "stable-semantics",
        "StableSemantics",
        "see",
        "build data of prompts, images and one attention map per noun phrase",
        (_UNET, _DIT),
        "StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations in "
        "Naturalistic Images",
        "Zawar et al.",
        2024,
        "2406.13735",
    ),
    Method(
        "act",
        "ACT",
        "steer",
        "shrink the harmful sinks of chosen heads while the model runs",
        (_LM,),
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without "
        "Training through Attention Calibration",
        "Yu et al.",
        2024,
        "2406.15765",
    ),
    Method(
        "var",
        "VAR",
        "steer",
        "give the attention that sink tokens waste back to the image",
        (_VLM,),
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "Kang et al.",
        2025,
        "2503.03321",
    ),
    Method(
        "structured-diffusion",
        "Structured Diffusion Guidance",
        "steer",
        "give each noun phrase its own encoding, so colours stay on their objects",
        (_UNET,),
        "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis",
        "Feng et al.",
        2022,
        "2212.05032",
    ),
    Method(
        "dynamic-prompt-learning",
        "Dynamic Prompt Learning",
        "steer",
        "relearn the nouns at every step so that attention maps stop leaking, then edit",
        (_UNET,),
        "Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing",
        "Wang et al.",
        2023,
        "2309.15664",
    ),
    Method(
        "swap-anything",
        "SwapAnything",
        "steer",
        "replace a masked object with a personal one and leave all other pixels alone",
        (_UNET,),
        "SwapAnything: Enabling Arbitrary Object Swapping in Personalized Visual Editing",
        "Gu et al.",
        2024,
        "2404.05717",
    ),
    Method(
        "steer",
        "STEER",
        "steer",
        "write synthetic text that stays in its domain and does not repeat itself",
        (_LM,),
        "Steering Language Generation: Harnessing Contrastive Expert Guidance and Negative "
        "Prompting for Coherent and Diverse Synthetic Data Generation",
        "O'Neill et al.",
        2023,
        "2308.07645",
    ),
    Method(
        "swap-planning",
        "SWAP",
        "steer",
        "reason in planned and checked steps: propose, predict, discriminate",
        (_LM,),
        "Deliberate Reasoning for LLMs as Structure-aware Planning with Accurate World Model",
        "Xiong et al.",
        2024,
        "2410.03136",
    ),
    Method(
        "task-kv",
        "Task-KV",
        "shrink",
        "keep the whole cache only for heads that say something different",
        (_LM, _VLM),
        "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
        "He et al.",
        2025,
        "2501.15113",
    ),
    Method(
        "recycled-attention",
        "Recycled Attention",
        "shrink",
        "decode over the tokens that the last full step looked at",
        (_LM,),
        "Recycled Attention: Efficient inference for long-context language models",
        "Xu et al.",
        2024,
        "2411.05787",
        home="recycled",
    ),
    Method(
        "visiondrop",
        "VisionDrop",
        "shrink",
        "drop and merge image tokens, judged by how image tokens see each other",
        (_VLM,),
        "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
        "Xu et al.",
        2025,
        "2506.22283",
    ),
    Method(
        "pka",
        "PKA",
        "shrink",
        "many image conditions in a diffusion transformer at near-linear cost",
        (_DIT,),
        "Rethinking Multi-Condition DiTs: Eliminating Redundant Attention via Position-Alignment "
        "and Keyword-Scoping",
        "Zhou et al.",
        2026,
        "2602.06850",
    ),
    Method(
        "agent-attention",
        "Agent Attention",
        "shrink",
        "two small attentions through a few agent tokens instead of one large one",
        (_VIT, _UNET),
        "Agent Attention: On the Integration of Softmax and Linear Attention",
        "Han et al.",
        2023,
        "2312.08874",
    ),
    Method(
        "deconstructed-attention",
        "Deconstructed attention",
        "shape",
        "swap attention for simpler mixers, layer by layer, and see what is needed",
        (_LM,),
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        "Xue et al.",
        2025,
        "2510.11602",
    ),
    Method(
        "mma",
        "Modality-mutual attention",
        "shape",
        "let image tokens look at the question",
        (_VLM,),
        "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for "
        "Multimodal LLMs",
        "Wang et al.",
        2025,
        "2503.02597",
    ),
    Method(
        "graph-attention",
        "Graph-aware attention",
        "shape",
        "read attention as a graph and aggregate it with graph networks",
        (_LM,),
        "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers",
        "Buehler",
        2025,
        "2501.02393",
    ),
    Method(
        "localist",
        "Localist LLMs",
        "shape",
        "a dial from opaque to rule-readable attention",
        (_LM, _ENCODER, _VIT),
        "Localist LLMs with Recruitment Learning",
        "Diederich",
        2025,
        "2510.17358",
    ),
    Method(
        "st-link",
        "ST-LINK",
        "shape",
        "forecast traffic with a language model that has the road graph in its attention",
        ("spatio-temporal", _LM),
        "ST-LINK: Spatially-Aware Large Language Models for Spatio-Temporal Forecasting",
        "Jeon et al.",
        2025,
        "2509.13753",
    ),
    Method(
        "mosaic",
        "MOSAIC",
        "shape",
        "teach a diffusion transformer where each reference subject belongs",
        (_DIT,),
        "MOSAIC: Multi-Subject Personalized Generation via Correspondence-Aware Alignment and "
        "Disentanglement",
        "She et al.",
        2025,
        "2509.01977",
    ),
    Method(
        "pooling",
        "Pooling and attention",
        "shape",
        "turn a decoder into a sentence encoder, and compare the designs fairly",
        (_LM, _ENCODER),
        "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?",
        "Tang and Yang",
        2024,
        "2409.02727",
    ),
    Method(
        "pixel-linguist",
        "Pixel Linguist",
        "shape",
        "sentence embeddings read from the picture of the text",
        (_VIT,),
        "Pixel Sentence Representation Learning",
        "Xiao et al.",
        2024,
        "2402.08183",
    ),
    Method(
        "cross-tune",
        "CrossTune",
        "shape",
        "few-shot classification by attending from a text to label descriptions",
        (_ENCODER, _LM),
        "CrossTune: Black-Box Few-Shot Classification with Label Enhancement",
        "Luo et al.",
        2024,
        "2403.12468",
    ),
    Method(
        "longca-bench",
        "LongCA-bench",
        "bench",
        "one fair bench for kernels, masks and context parallelism",
        (_ANY,),
        "Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context "
        "Parallelism",
        "Bu et al.",
        2025,
        "2510.17896",
        home="kernels",
    ),
)


def methods() -> list[Method]:
    """Return all methods, in the order of the verbs.

    >>> len(methods()), methods()[0].slug
    (27, 'sink-emergence')
    """
    return list(_METHODS)


def as_markdown() -> str:
    """Return the catalogue as a Markdown page."""
    rows = methods()
    ready = sum(row.status == "available" for row in rows)
    columns = ["method", "what it does", "models", "paper", "status", "reproduced?"]
    sections = []
    for verb, promise in VERBS.items():
        cells = [
            [
                f"{row.name} (`{row.slug}`)",
                row.what,
                ", ".join(row.families),
                f"[{row.title}]({row.url}), {row.authors} {row.year}",
                row.status,
                row.reproduction,
            ]
            for row in rows
            if row.verb == verb
        ]
        sections.append(Section(f"{verb}: {promise}", [Table(columns, cells)]))
    intro = (
        f"{len(rows)} methods, {ready} of them available so far. The last column sums up what our "
        "own measurements say of the paper's claims; `-` means that nothing has been measured yet."
    )
    source = "src/regard/catalog.py by `make docs`"
    return Page("Methods", sections, [intro], source=source).markdown()


MARKS = ("<!-- methods: made by `make docs` -->", "<!-- end of methods -->")


def into_readme(readme: str) -> str:
    """Return the README with the short catalogue renewed between its two marks."""
    head, _, rest = readme.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    rows = []
    for verb, promise in VERBS.items():
        names = [
            f"**{row.slug}**" if row.status == "available" else row.slug
            for row in methods()
            if row.verb == verb
        ]
        rows.append([Cell(verb, "bold"), promise, ", ".join(names)])
    table = Table(["verb", "what a person gets", "methods"], rows).markdown()
    return f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Print the catalogue, or write it to the file named; into a README, between its marks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) > 1:
        print("usage: python -m regard.catalog [FILE]", file=sys.stderr)
        return 2
    page = as_markdown()
    if not arguments:
        print(page, end="")
        return 0
    path = Path(arguments[0])
    if path.is_file() and MARKS[0] in (old := path.read_text(encoding="utf-8")):
        page = into_readme(old)
    try:
        write_text(path, page)
    except OSError as problem:
        print(f"Cannot write {path}: {problem.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
