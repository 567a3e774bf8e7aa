"""What `vitscale plan` prints on a terminal, and its drawing."""

import math

from data_tools.page import short
from vitscale.layouts import RESERVE, Option
from vitscale.plan import Plan, checkpointing, sides


def text(plan: Plan) -> str:
    """What the terminal shows."""
    lines = []
    phased = len(plan.chosen.parts) > 1
    titles = {
        "memory": "memory of a GPU", "traffic": "traffic of a step, of a GPU", "run": "the run",
        "step": f"a step{' after the last phase' * phased}",
    }  # fmt: skip
    for name, figures in plan.sections.items():
        lines += ["", titles.get(name, name)]
        lines += [f"  {f.name.replace('_', ' '):<26}{f.said:>26}  {f.basis:<10}{f.how}" for f in figures]
        if name == "step" and phased:
            lines += ["", "phases, predicted", *phases(plan.chosen)]
    lines += ["", "what fits: the largest micro-batch, GB by kind at the highest moment, predicted"]
    kinds, ms = list(plan.chosen.memory.kinds()), "mean step ms" if phased else "step ms"
    lines.append(
        f"  {'ZeRO':<6}{'checkpointing':<26}{'micro':>6}{ms:>13}{'peak':>8}{''.join(f'{kind:>12}' for kind in (*kinds, 'reserve'))}"
    )
    asked = plan.asked
    for o in (*plan.options, *([asked] if asked and asked not in plan.options else [])):
        row = f"  {o.zero_stage:<6}{checkpointing(o.keeps):<26}"
        if o.parts:
            row += f"{o.last.micro_batch_size:>6}{1e3 * o.step_seconds:>13.1f}{(o.memory.total + RESERVE) / 1e9:>8.1f}"
            row += "".join(f"{size / 1e9:>12.2f}" for size in (*o.memory.kinds().values(), RESERVE))
        marks = ["does not fit"] * (not o.fits) + ["<- the config"] * (o == asked) + ["<- chosen"] * (o == plan.chosen)
        lines.append(" ".join([row, *marks]))
    priced = any(row.cost for row in plan.scaling)
    for kind, told in (
        ("strong", "one global batch"),
        ("weak", "the same images a GPU: another batch than the recipe's, so fewer or more steps over as many images"),
    ):
        lines += ["", f"{kind} scaling ({told})"]
        lines.append(
            f"  {'nodes':>5}{'GPUs':>6}{'batch':>9}{'a GPU':>7}{'micro':>7}{'ZeRO':>6}{ms:>13}{'images/s':>11}{'efficiency':>12}"
            f"{'MFU':>7}{'days':>9}{'GPU-days':>10}{'cost' if priced else '':>13}".rstrip()
        )
        lines += [
            f"  {r.nodes:>5}{r.gpus:>6}{r.global_batch_size:>9}{r.images_a_gpu:>7}{r.micro_batch_size:>7}{r.zero_stage:>6}"
            f"{1e3 * r.step_seconds:>13.1f}{r.images_per_second:>11,.0f}{r.efficiency:>12.0%}"
            f"{r.mfu:>7.1%}{r.days:>9,.2f}{r.gpu_days:>10,.1f}{f'{r.cost:>13,.0f}' if priced else ''}  predicted"
            for r in plan.scaling
            if r.scaling == kind
        ]
    return "\n".join([*lines, "", *plan.advice]).lstrip("\n")


def phases(option: Option) -> list[str]:
    """The table of a run's parts."""
    head = f"  {'image':>11}{'batch':>8}{'micro':>7}{'steps':>12}{'images':>16}{'step ms':>10}{'images/s':>11}{'peak GB':>9}{'days':>8}"
    return [head] + [
        f"  {sides(p.image_size):>11}{p.global_batch_size:>8}{p.micro_batch_size:>7}{round(p.steps):>12,}{p.images:>16,}"
        f"{1e3 * p.took.total:>10.1f}{p.global_batch_size / p.took.total:>11,.0f}{(p.memory.total + RESERVE) / 1e9:>9.1f}"
        f"{p.seconds / 86_400:>8.2f}"
        for p in option.parts
    ]


def svg(plan: Plan) -> str:
    """Days and efficiency against nodes, both axes' nodes by powers of two: a file by itself."""
    rows = [row for row in plan.scaling if row.scaling == "strong"]
    width, height, left, right, top, bottom = 720, 360, 64, 64, 40, 48
    low, high = (math.log2(f(row.nodes for row in rows)) for f in (min, max))
    most = max(row.days for row in rows)

    def x(nodes: int) -> float:
        return left + (math.log2(nodes) - low) / max(1e-9, high - low) * (width - left - right)

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    drawn = []
    for i in range(5):
        at = y(i / 4)
        drawn.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e8f0"/>')
        drawn.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{short(most * i / 4)}</text>')
        drawn.append(f'<text x="{width - right + 8}" y="{at + 4:.1f}">{i / 4:.0%}</text>')
    drawn += [f'<text x="{x(r.nodes):.1f}" y="{height - bottom + 18}" text-anchor="middle">{r.nodes}</text>' for r in rows]
    for color, name, share in (("#2563eb", "days", lambda r: r.days / most), ("#ea7317", "efficiency", lambda r: min(1.0, r.efficiency))):
        points = [(x(r.nodes), y(share(r))) for r in rows]  # type: ignore[no-untyped-call]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"><title>{name}</title></polyline>')
        drawn += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
    drawn.append(f'<text x="{left}" y="22" fill="#2563eb">days</text>')
    drawn.append(f'<text x="{width - right}" y="22" fill="#ea7317" text-anchor="end">efficiency</text>')
    drawn.append(f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">nodes (predicted, one global batch)</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="#475569"><rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )
