"""The audit sheet of a dialled answer: what was asked, what the dial did, what it cannot say."""

from __future__ import annotations

from typing import Any

from regard.report.document import Block, Items, Page, Pairs, Section
from regard.report.table import Table

from .view import KINDS, tables

LIMITS = (
    "Fidelity is where attention goes. It does not show that the answer is faithful to the block: "
    "layers mix tokens, and what was read from one block travels with later tokens.",
    "A mean hides heads that ignore the rule: see the least head of each layer.",
    "The bounds are inequalities about one row of attention; they say nothing about the words.",
)


def sheet(result: dict[str, Any]) -> Page:
    """The page of what `regard run localist` found."""
    plain, dialled = result["plain"], result["dialled"]
    answers = Table(
        ["dial", "answer"], [["0", plain["answer"]], [f"{result['locality']:g}", dialled["answer"]]]
    )
    names = [b["block"] for b in dialled["report"]["blocks"]]
    counts = [b["tokens"] for b in dialled["report"]["blocks"]]
    blocks = Table(["block", "tokens", "relevant"], [
        [n, str(c), "yes" if n in ("free", *result["toward"]) else "no"]
        for n, c in zip(names, counts)
    ])  # fmt: skip
    rules: list[Block] = [
        Pairs([(f["rule"], f"row {f['row']}: tokens {f['queries']}") for f in fired])
        if (fired := dialled["report"]["fired"])
        else "No rule fired."
    ]
    made = []
    for title, one in (("Dial at 0", plain), (f"Dial at {result['locality']:g}", dialled)):
        for table in tables(one["report"])[:1]:
            body = Table(table["columns"], [[str(c) for c in row] for row in table["rows"]])
            made.append(Section(title, [body, table["note"]]))
    violations = sum(
        sum(one["report"][kind]["violations"].values())
        for one in (plain, dialled)
        for kind in KINDS
    )
    figures = result["figures"]
    return Page(
        "Locality audit",
        [
            Section("Answers", [answers]),
            Section("Blocks", [blocks]),
            Section("Rules", rules),
            Section("Figures", [figures_table(figures)]),
            *made,
            Section("What this sheet does not say", [Items(LIMITS)]),
        ],
        intro=[f"Question: {result['question']}"],
        about="audit",
        under=[
            f"model {result['settings']['model']}, {result['loaded']}",
            f"locality {result['locality']:g}, beta {result['beta']:.3g} nats",
            f"{result['prompt_tokens']} prompt tokens",
        ],
        facts=[
            (
                f"{100 * figures[-1]['leakage']:.2g} %",
                "of attention lies on other blocks",
            ),
            (f"{100 * figures[0]['leakage']:.2g} %", "at dial 0"),
            (str(violations), "violations of the bounds C1 to C3"),
        ],
    )


def figures_table(figures: list[dict[str, Any]]) -> Table:
    """Leakage, fidelity and entropy at each setting of the dial."""
    rows = [
        [
            f"{f['locality']:g}",
            *(f"{f[n]:.4f}" for n in ("leakage", "fidelity", "least_head_fidelity")),
            f"{f['entropy_bits']:.3f}",
            f"{f['first_token_mass']:.3f}",
            str(sum(f["violations"].values())),
        ]
        for f in figures
    ]
    return Table(
        ["dial", "leakage", "fidelity", "least head", "entropy, bits", "on token 0", "violations"],
        rows,
    )
