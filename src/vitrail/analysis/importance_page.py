"""The page of `vitrail inspect importance`: which channels matter, in words, a table and pictures."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.analysis import page
from vitrail.analysis.importance import PARTS, Importance, Part
from vitrail.analysis.prune import Slimming
from vitrail.configuration import to_dict

MOST = 0.9  # of the importance: what a share of the channels is asked to hold
COLOURS: dict[Part, str] = {"Q": "#2f6fb3", "K": "#2d8a57", "V": "#b8433f", "FFN": "#8a5aa8"}


def importance_words(name: str, found: Importance) -> str:
    """Which parts are wider than they need to be, in a sentence or two."""
    shares: dict[tuple[int, Part], float] = {
        (stage, part): found.share_for(stage, part, MOST)
        for stage in found.stages
        for part in PARTS
        if found.of(stage, part).numel()
    }

    nothing = [key for key, share in shares.items() if share == 0]
    shares = {key: share for key, share in shares.items() if share > 0}

    def place(stage: int, part: Part) -> str:
        return part if len(found.stages) == 1 else f"{part} of stage {stage}"

    least, most = min(shares, key=lambda k: shares[k]), max(shares, key=lambda k: shares[k])
    words = (
        f"{name}: importance is gathered in the fewest channels in {place(*least)}, where "
        f"{100 * shares[least]:.0f} % of them hold {100 * MOST:.0f} % of it, and is spread most evenly in "
        f"{place(*most)} ({100 * shares[most]:.0f} %)."
    )
    if nothing:
        words += f" Without any effect on the loss: {', '.join(place(*key) for key in nothing)}."
    return words


def importance_page(
    path: Path,
    name: str,
    found: Importance,
    *,
    plan: Slimming | None = None,
    costs: list[tuple[str, str, str]] | None = None,
    config: Any = None,
) -> Path:
    """Write the page. plan, costs (what, before, after) and config (the old one) describe a slimmer model."""
    out = page.Page("Which channels matter", importance_words(name, found))
    out.section(
        "By stage and part",
        page.paragraph(
            "Importance of a channel: |gradient x weight|, summed over its own weights, the mean over "
            f"batches of {found.images} pictures: about how much the loss would change without it. A small "
            f"share that holds {100 * MOST:.0f} % of it says that the part is wider than it need be."
        ),
        page.table(
            ("stage", "part", "channels", f"share for {100 * MOST:.0f} %", "mean x 1000", "no effect"),
            [
                (stage, part, len(s), found.share_for(stage, part, MOST), 1000 * float(s.mean()),
                 int((s == 0).sum()))
                for stage in found.stages
                for part in PARTS
                if (s := found.of(stage, part)).numel()
            ],
        ),
    )  # fmt: skip
    out.section(
        "From the most to the least important channel",
        page.paragraph(
            "Share of the importance that the best channels hold. A straight line: all matter alike."
        ),
        page.plots(*(_curves(found, stage) for stage in found.stages)),
    )
    if plan is not None:
        rows = [
            (stage, "Q and K, a head" if kind == "QK" else "FFN", before, after)
            for stage, kind, before, after in plan.widths
        ]
        changed = [f"{k}: {a} -> {b}" for k, a, b in changes(config, plan.config)]
        out.section(
            "A slimmer model",
            page.paragraph("Values keep their width, as in EfficientViT's study."),
            page.table(("stage", "part", "before", "after"), rows),
            page.table(("", "before", "after"), costs or []),
            page.preformatted("\n".join(changed) or "nothing changes"),
        )
    return out.write(path)


def changes(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """(field, value before, value after) where two configs of one kind differ."""
    # A slimmer ViT's config has the fields of a study too.
    same = type(after)(**{f.name: getattr(before, f.name) for f in fields(before)})
    a, b = to_dict(same), to_dict(after)
    return [(key, a[key], b[key]) for key in a if a[key] != b[key]]


def _curves(found: Importance, stage: int) -> str:
    fig, ax = page.figure(4.4, 3.4)
    for part in PARTS:
        scores = np.sort(found.of(stage, part).numpy())[::-1]
        if scores.size and scores.sum() > 0:
            held = np.concatenate([[0.0], scores.cumsum() / scores.sum()])
            x = np.linspace(0, 1, len(held))
            ax.plot(x, held, color=COLOURS[part], linewidth=1.6, label=part)
    ax.plot([0, 1], [0, 1], color=page.SOFT, linewidth=1)
    ax.set_xlabel("share of channels")
    ax.set_title(
        "importance held" + (f", stage {stage}" if len(found.stages) > 1 else ""), fontsize=11
    )
    ax.legend(frameon=False, fontsize=9)
    return page.svg(fig)
