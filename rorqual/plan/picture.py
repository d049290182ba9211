"""A picture of an architecture as one SVG, with every number read from its configuration.

Three columns, each read from below: the stack of layers, one layer's attention with its projections and its cache, and
one layer's experts with the MTP module. Nothing here is drawn by hand for one model: a configuration without a query
latent, without groups, dense layers or MTP gives a picture without them. The sheet has its own background, so it stands
on light and dark pages. No dependency, no measuring of fonts: text that might be too wide for its place is set smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rorqual.config import ModelConfig
from rorqual.plan import count

WIDTH, HEIGHT = 1500, 1030
TOP, BOTTOM = 104, 1000
SPLIT, JOIN = TOP + 472, TOP + 276  # of the attention: where heads fan out, and the lower edge of the softmax
INK, MUTED, LINE, PAPER, CARD = "#1f2933", "#5f6b7a", "#8a94a3", "#f7f5ef", "#ffffff"
# (fill, stroke) by what a box is.
ATTENTION, LATENT, EXPERTS = ("#dfeaf7", "#2f6db3"), ("#fce8cd", "#c0741b"), ("#dff0e4", "#2e8056")
TABLE, NORM = ("#eae4f6", "#6a4fb0"), ("#efede7", "#a29d90")
Point = tuple[float, float]
Colour = tuple[str, str]


def draw(cfg: ModelConfig, name: str = "") -> str:
    """The picture of a configuration; `name` is its title."""
    sheet = Sheet()
    total, active = count.totals(cfg)
    sheet.text(40, 50, name or "DeepSeek-V3 architecture", 28, weight=700)
    sheet.text(
        40, 78,
        f"{big(total)} parameters · {big(active)} active on a token · {cfg.num_hidden_layers} layers · vocabulary "
        f"{cfg.vocab_size:,} · context {cfg.max_position_embeddings:,}",
        15, MUTED,
    )  # fmt: skip
    _stack(sheet, cfg, 40, 340)
    _attention(sheet, cfg, 400, 560)
    below = TOP + 500 if cfg.num_nextn_predict_layers else BOTTOM - 52
    if cfg.first_k_dense_replace < cfg.num_hidden_layers or cfg.num_nextn_predict_layers:
        _experts(sheet, cfg, 980, 480, below - 20)
    _mtp(sheet, cfg, 980, 480, below)
    return sheet.svg()


def big(n: int) -> str:
    """A count in three or four digits: 671.0 B, 37.55 B, 9.2 M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.2f} {unit}" if n < 100 * size else f"{n / size:.1f} {unit}"
    return str(n)


class Sheet:
    """SVG elements in the order they were drawn."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 13,
        fill: str = INK,
        anchor: str = "start",
        weight: int = 400,
        room: float | None = None,
    ) -> None:
        """room: the width it must fit; an average letter takes 0.56 of the font size (0.6 where bold)."""
        if room is not None:
            size = min(size, room / (max(len(words), 1) * (0.6 if weight > 500 else 0.56)))
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:.3g}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words, quote=False)}</text>'
        )

    def rect(self, x: float, y: float, w: float, h: float, colour: Colour, r: float = 8, width: float = 1.4) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" fill="{colour[0]}" '
            f'stroke="{colour[1]}" stroke-width="{width:g}"/>'
        )

    def box(self, x: float, y: float, w: float, h: float, colour: Colour, title: str, under: str = "") -> None:
        """A box with one or two centred lines."""
        self.rect(x, y, w, h, colour)
        middle, room, size = x + w / 2, w - 14, min(13.5, 0.62 * h)
        line = y + h / 2 + (-3 if under else 0.36 * size)
        self.text(middle, line, title, size, anchor="middle", weight=600, room=room)
        if under:
            self.text(middle, y + h / 2 + 15, under, 12.5, MUTED, "middle", room=room)

    def path(self, points: Sequence[Point], arrow: bool = True, colour: str = LINE, dashed: bool = False) -> None:
        d = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        extra = (' marker-end="url(#tip)"' if arrow else "") + (' stroke-dasharray="5 4"' if dashed else "")
        self.parts.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="1.6"{extra}/>')

    def plus(self, x: float, y: float) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{CARD}" stroke="{LINE}" stroke-width="1.4"/>')
        self.path([(x - 5, y), (x + 5, y)], arrow=False)
        self.path([(x, y - 5), (x, y + 5)], arrow=False)

    def panel(self, x: float, y: float, w: float, bottom: float, title: str, note: str = "") -> None:
        self.rect(x, y, w, bottom - y, (CARD, "#dcd7c9"), 14)
        self.text(x + 18, y + 28, title, 16, weight=700)
        self.text(x + w - 18, y + 28, note, 12.5, MUTED, "end", room=w - 60 - 10 * len(title))

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="Inter, Helvetica, Arial, sans-serif" role="img">'
        )
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0,0.6 L7.4,4 L0,7.4 Z" fill="{LINE}"/></marker></defs>'
        )
        ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="18" fill="{PAPER}"/>'
        return "\n".join([head, tip, ground, *self.parts, "</svg>"]) + "\n"


# ---- the stack ------------------------------------------------------------------------------------------------------


def _stack(sheet: Sheet, cfg: ModelConfig, x: float, w: float) -> None:
    D, V, dense = cfg.hidden_size, cfg.vocab_size, cfg.first_k_dense_replace
    moe = cfg.num_hidden_layers - dense
    sheet.panel(x, TOP, w, BOTTOM, "The stack", f"residual stream {D:,} wide")
    middle, left, width = x + w / 2, x + 46, w - 92
    sheet.text(middle, BOTTOM - 18, "tokens", 13, MUTED, "middle")
    sheet.path([(middle, BOTTOM - 34), (middle, BOTTOM - 52)])
    y: float = BOTTOM - 102
    sheet.box(left, y, width, 48, TABLE, "Embedding", f"{V:,} × {D:,}")
    blocks = []
    if dense:
        blocks.append((dense, "dense", f"SwiGLU, {cfg.intermediate_size:,} wide", EXPERTS))
    if moe:
        shared = f" + {cfg.n_shared_experts} shared" if cfg.n_shared_experts else ""
        blocks.append((moe, "MoE", f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts}{shared}", EXPERTS))
    room = (y - (TOP + 200)) / len(blocks)
    for times, kind, says, colour in blocks:
        sheet.path([(middle, y), (middle, y - 24)])
        height = min(room - 30, 260)
        y -= 24 + height
        _block(sheet, cfg, (x + 20, y, w - 40, height), times, (kind, says, colour))
    sheet.path([(middle, y), (middle, y - 24)])
    sheet.box(left + 30, y - 58, width - 60, 34, NORM, f"RMSNorm {D:,}")
    if cfg.num_nextn_predict_layers:
        sheet.path([(left + width - 30, y - 41), (x + w - 8, y - 41)], dashed=True)
        sheet.text(x + w - 14, y - 49, "h to MTP", 11.5, MUTED, "end")
    sheet.path([(middle, y - 58), (middle, y - 76)])
    tied = ", the embedding's own" if cfg.tie_word_embeddings else ""
    sheet.box(left, y - 124, width, 48, TABLE, "Head", f"{D:,} → {V:,}{tied}")
    sheet.path([(middle, y - 124), (middle, y - 142)])
    sheet.text(middle, y - 149, "next token", 13, MUTED, "middle")


def _block(
    sheet: Sheet, cfg: ModelConfig, at: tuple[float, float, float, float], times: int, feed: tuple[str, str, Colour]
) -> None:
    """`times` layers: norm, attention, add; norm, feed-forward, add."""
    x, y, w, h = at
    kind, says, colour = feed
    sheet.rect(x, y, w, h, ("#faf9f5", "#c9c3b2"), 12)
    sheet.text(x + 12, y + 21, f"× {times}", 17, weight=700)
    sheet.text(x + w - 12, y + 20, f"{kind} layers", 12.5, MUTED, "end")
    left, width, middle = x + 34, w - 68, x + w / 2
    step = (h - 44) / 2
    heads = f"{cfg.num_attention_heads} heads, latent {cfg.kv_lora_rank} + {cfg.qk_rope_head_dim}"
    rows = ((y + h, "MLA", heads, ATTENTION), (y + h - step, "MoE" if kind == "MoE" else "Feed-forward", says, colour))
    for base, title, under, fill in rows:
        bottom = base - 14
        tall = step - 56
        sheet.path([(middle, base), (middle, bottom)], arrow=False)
        sheet.box(left, bottom - 18, width, 18, NORM, "RMSNorm")
        sheet.box(left, bottom - 24 - tall, width, tall, fill, title, under)
        sheet.path([(middle, bottom - 18), (middle, bottom - 24)], arrow=False)
        sheet.path([(middle, bottom - 24 - tall), (middle, bottom - 42 - tall)], arrow=False)
        add = bottom - 33 - tall
        side = x + 17
        sheet.path([(middle, base - 5), (side, base - 5), (side, add), (middle - 10, add)])
        sheet.plus(middle, add)
    sheet.path([(middle, y + 44), (middle, y)], arrow=False)


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention(sheet: Sheet, cfg: ModelConfig, x: float, w: float) -> None:
    D, H = cfg.hidden_size, cfg.num_attention_heads
    N, R, U = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    sheet.panel(x, TOP, w, BOTTOM, "Multi-head latent attention", f"{big(count.attention_parameters(cfg))} a layer")
    middle, left, right, width = x + w / 2, x + 20, x + w / 2 + 14, w / 2 - 34
    sheet.text(middle, BOTTOM - 18, f"x  {D:,}", 13, MUTED, "middle")
    for to in (left + width / 2, right + width / 2):
        sheet.path([(middle, BOTTOM - 34), (middle, BOTTOM - 48), (to, BOTTOM - 48), (to, BOTTOM - 64)])
    _queries(sheet, cfg, left, width)
    _keys(sheet, cfg, right, width)
    attend = TOP + 214
    sheet.box(
        left, attend, w - 40, 62, ATTENTION,
        f"softmax(q · k × {cfg.softmax_scale:.4f}) · v   in {H} heads",
        f"q and k {N} + {R} = {cfg.qk_head_dim} wide, k's {R} shared by all heads; v {U} wide",
    )  # fmt: skip
    sheet.path([(middle, attend), (middle, attend - 22)])
    sheet.box(middle - 140, attend - 72, 280, 50, ATTENTION, "o_proj", f"{H} × {U} = {H * U:,} → {D:,}")
    sheet.path([(middle, attend - 72), (middle, attend - 94)])
    pair, lean = 2 * (cfg.qk_head_dim + U), 2 * (cfg.cache_dim + cfg.kv_lora_rank)
    for i, words in enumerate((
        _rotary(cfg),
        f"one pair of tokens in one head: {pair:,} operations where keys are expanded,",
        f"{lean:,} absorbed, where the query moves into the latent space instead",
    )):  # fmt: skip
        sheet.text(middle, TOP + 62 + 18 * i, words, 12.5, MUTED, "middle", room=w - 40)


def _queries(sheet: Sheet, cfg: ModelConfig, x: float, w: float) -> None:
    D, H, Q = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank
    N, R = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    middle, split = x + w / 2, SPLIT
    per_head = f"{H} × ({N} + {R}) = {H * cfg.qk_head_dim:,}"
    if Q is None:
        low = BOTTOM - 116
        sheet.box(x, low, w, 52, ATTENTION, "q_proj", f"{D:,} → {per_head}")
    else:
        sheet.box(x, BOTTOM - 116, w, 52, ATTENTION, "q_a_proj", f"{D:,} → {Q:,}")
        sheet.path([(middle, BOTTOM - 116), (middle, BOTTOM - 138)])
        sheet.box(x + 40, BOTTOM - 170, w - 80, 32, NORM, f"RMSNorm {Q:,}")
        sheet.path([(middle, BOTTOM - 170), (middle, BOTTOM - 194)])
        low = BOTTOM - 246
        sheet.box(x, low, w, 52, ATTENTION, "q_b_proj", f"{Q:,} → {per_head}")
    half = (w - 14) / 2
    for i, (title, size) in enumerate((("q_nope", N), ("q_rope", R))):
        to = x + i * (half + 14) + half / 2
        sheet.path([(middle, low), (middle, low - 20), (to, low - 20), (to, split + 44)])
        sheet.box(to - half / 2, split, half, 44, ("#f1f6fc", ATTENTION[1]), title, f"{H} × {size}")
    rope = x + half + 14 + half / 2
    _rope(sheet, rope, split)
    sheet.path([(x + half / 2, split), (x + half / 2, JOIN)])
    sheet.path([(rope, split - 56), (rope, JOIN)])


def _keys(sheet: Sheet, cfg: ModelConfig, x: float, w: float) -> None:
    D, H, C = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    N, R, U = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    wide, narrow = w * 0.62, w * 0.38 - 14
    latent, key = x + wide / 2, x + w - narrow / 2
    sheet.box(x, BOTTOM - 116, w, 52, ATTENTION, "kv_a_proj_with_mqa", f"{D:,} → {C} + {R}")
    sheet.path([(latent, BOTTOM - 116), (latent, BOTTOM - 138)])
    sheet.box(x, BOTTOM - 170, wide, 32, NORM, f"RMSNorm {C}")
    sheet.path([(key, BOTTOM - 116), (key, BOTTOM - 138)])
    sheet.box(x + w - narrow, BOTTOM - 170, narrow, 32, ("#ffffff", LATENT[1]), "RoPE")
    cache = BOTTOM - 272
    for at in (latent, key):
        sheet.path([(at, BOTTOM - 170), (at, cache + 86)])
    _cache(sheet, cfg, (x, cache, w, wide))
    sheet.path([(latent, cache), (latent, cache - 30)])
    low = cache - 82
    sheet.box(x, low, wide, 52, ATTENTION, "kv_b_proj", f"{C} → {H} × ({N} + {U})")
    split, half = SPLIT, (wide - 10) / 2
    for i, (title, size) in enumerate((("k_nope", N), ("v", U))):
        to = x + i * (half + 10) + half / 2
        sheet.path([(latent, low), (latent, low - 14), (to, low - 14), (to, split + 44)])
        sheet.box(to - half / 2, split, half, 44, ("#f1f6fc", ATTENTION[1]), title, f"{H} × {size}")
        sheet.path([(to, split), (to, JOIN)])
    sheet.path([(key, cache), (key, split + 44)])
    sheet.box(x + w - narrow, split, narrow, 44, ("#fff7ea", LATENT[1]), "k_rope", f"1 × {R}")
    sheet.path([(key, split), (key, JOIN)])


def _cache(sheet: Sheet, cfg: ModelConfig, at: tuple[float, float, float, float]) -> None:
    """The two parts of what is cached; the bar's halves are not to scale, the numbers are."""
    x, y, w, wide = at
    sheet.rect(x - 8, y - 8, w + 16, 94, ("none", LATENT[1]), 12, 1)
    sheet.rect(x, y, wide, 40, LATENT)
    sheet.rect(x + wide + 14, y, w - wide - 14, 40, LATENT)
    sheet.text(x + wide / 2, y + 25, f"c_kv  {cfg.kv_lora_rank}", 13.5, anchor="middle", weight=600)
    sheet.text(
        x + wide + 14 + (w - wide - 14) / 2, y + 25, str(cfg.qk_rope_head_dim), 13.5, anchor="middle", weight=600
    )
    says = (f"cache: {cfg.cache_dim} numbers a token and layer,", f"{count.cache_bytes_per_token(cfg):,} bytes in bf16")
    for i, words in enumerate(says):
        sheet.text(x + w / 2, y + 58 + 17 * i, words, 12.5, MUTED, "middle", room=w)


def _rope(sheet: Sheet, x: float, split: float) -> None:
    sheet.path([(x, split), (x, split - 24)])
    sheet.box(x - 44, split - 56, 88, 32, ("#ffffff", ATTENTION[1]), "RoPE")


def _rotary(cfg: ModelConfig) -> str:
    words = f"RoPE: θ {cfg.rope_theta:,.0f}"
    if cfg.rope_scaling:
        original = cfg.rope_scaling["original_max_position_embeddings"]
        words += f", YaRN × {cfg.rope_scaling['factor']:g} over {original:,}"
    return words


# ---- experts --------------------------------------------------------------------------------------------------------


def _experts(sheet: Sheet, cfg: ModelConfig, x: float, w: float, bottom: float) -> None:
    D, E, K, F = cfg.hidden_size, cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.moe_intermediate_size
    expert = 3 * D * F
    sheet.panel(x, TOP, w, bottom, "DeepSeekMoE", f"{big(expert)} an expert, {K} + {cfg.n_shared_experts} of them work")
    left, width = x + 20, w - 40
    router, shared = left + width * 0.33, left + width * 0.83
    sheet.text(x + w / 2, bottom - 16, f"x  {D:,}", 13, MUTED, "middle")
    for to in (router, shared):
        sheet.path([(x + w / 2, bottom - 32), (x + w / 2, bottom - 44), (to, bottom - 44), (to, bottom - 58)])
    sheet.box(
        left, bottom - 106, width * 0.66, 48, NORM, "router, fp32", f"{E} × {D:,}, sigmoid, + bias for the choice"
    )
    grid_bottom = bottom - 172
    sheet.path([(router, bottom - 106), (router, grid_bottom + 42)])
    sheet.text(left + width * 0.33, grid_bottom + 32, _choice(cfg), 12.5, INK, "middle", 600, room=width * 0.66)
    note = f"the {K} weights sum to 1, times {cfg.routed_scaling_factor:g}"
    if not cfg.norm_topk_prob:
        note = f"the {K} weights as scored, times {cfg.routed_scaling_factor:g}"
    sheet.text(left + width * 0.33, grid_bottom + 14, note, 12, MUTED, "middle", room=width * 0.66)
    _grid(sheet, cfg, (left, TOP + 150, width * 0.66, grid_bottom - TOP - 150))
    tall = 116
    sheet.box(
        left + width * 0.7, bottom - 106 - (tall - 48), width * 0.3, tall, EXPERTS, f"shared × {cfg.n_shared_experts}",
        f"{cfg.n_shared_experts * F:,} wide",
    )  # fmt: skip
    add = TOP + 78
    sheet.text(router, TOP + 128, f"each {D:,} → {F:,} → {D:,}, SwiGLU", 12.5, MUTED, "middle", room=width * 0.66)
    sheet.path([(router, TOP + 112), (router, add), (x + w / 2 - 10, add)])
    sheet.path([(shared, bottom - 106 - (tall - 48)), (shared, add), (x + w / 2 + 10, add)])
    sheet.plus(x + w / 2, add)
    sheet.path([(x + w / 2, add - 9), (x + w / 2, add - 32)])


def _choice(cfg: ModelConfig) -> str:
    K, E = cfg.num_experts_per_tok, cfg.n_routed_experts
    if cfg.n_group == 1:
        return f"the best {K} of {E}"
    return f"best {cfg.topk_group} of {cfg.n_group} groups, then best {K} of {E}"


def _grid(sheet: Sheet, cfg: ModelConfig, at: tuple[float, float, float, float]) -> None:
    """Every expert a cell, by group; one possible choice is filled."""
    x, y, w, h = at
    G, per_group = cfg.n_group, cfg.n_routed_experts // cfg.n_group
    rows_of_groups = max(round(math.sqrt(G * h / w)), 1)
    columns = math.ceil(G / rows_of_groups)
    gap = min(8.0, w / columns / 6)
    gw, gh = (w - gap * (columns - 1)) / columns, (h - gap * (rows_of_groups - 1)) / rows_of_groups
    cell, across = _cells(gw - gap, gh - gap, per_group)
    kept = _spread(G, cfg.topk_group)
    share = [cfg.num_experts_per_tok // len(kept) + (i < cfg.num_experts_per_tok % len(kept)) for i in range(len(kept))]
    for g in range(G):
        gx, gy = x + (g % columns) * (gw + gap), y + (g // columns) * (gh + gap)
        inside = g in kept
        sheet.rect(gx, gy, gw, gh, ("#eef7f0" if inside else "#fbfaf6", EXPERTS[1] if inside else "#dcd7c9"), 6, 1)
        chosen = _spread(per_group, min(share[kept.index(g)], per_group), g) if inside else []
        down = math.ceil(per_group / across)
        ox, oy = gx + (gw - across * cell) / 2, gy + (gh - down * cell) / 2
        for e in range(per_group):
            fill = EXPERTS[1] if e in chosen else ("#c5e3cf" if inside else "#e9e6dc")
            cx, cy = ox + (e % across) * cell, oy + (e // across) * cell
            side = cell * 0.82
            sheet.parts.append(
                f'<rect x="{cx:.2f}" y="{cy:.2f}" width="{side:.2f}" height="{side:.2f}" rx="{side / 5:.2f}" fill="{fill}"/>'
            )


def _cells(w: float, h: float, n: int) -> tuple[float, int]:
    """(size, how many side by side) of n square cells, as large as fit into w × h and at most 26."""

    def size(across: int) -> float:
        return min(w / across, h / math.ceil(n / across), 26.0)

    # Full rows look better than slightly larger cells.
    best = max(range(1, n + 1), key=lambda across: (size(across) * (1 if n % across == 0 else 0.7), across))
    return size(best), best


def _spread(n: int, k: int, turn: int = 0) -> list[int]:
    """k of range(n), evenly and not in a row: a picture of some choice."""
    return sorted({(i * n // k + (turn * 5 + 3 * i * i + 1) % max(n // k, 1)) % n for i in range(k)})


# ---- multi-token prediction -------------------------------------------------------------------------------------------


def _mtp(sheet: Sheet, cfg: ModelConfig, x: float, w: float, top: float) -> None:
    D, V, depth = cfg.hidden_size, cfg.vocab_size, cfg.num_nextn_predict_layers
    first = cfg.num_hidden_layers
    if not depth:
        sheet.panel(x, top, w, top + 52, "Multi-token prediction", "no module in this model")
        return
    at = f"layer {first}" if depth == 1 else f"layers {first} to {first + depth - 1}"
    sheet.panel(x, top, w, BOTTOM, "Multi-token prediction", f"× {depth}, {at}: {big(count.parts(cfg)[-1].total)}")
    left, width, middle = x + 20, w - 40, x + w / 2
    half = (width - 20) / 2
    for i, (below, norm) in enumerate(
        (("embedding of token i + 1", "enorm"), ("h of token i, after the norm", "hnorm"))
    ):
        at_x = left + i * (half + 20)
        centre = at_x + half / 2
        sheet.text(centre, BOTTOM - 16, below, 12.5, MUTED, "middle", room=half)
        sheet.path([(centre, BOTTOM - 32), (centre, BOTTOM - 48)])
        sheet.box(at_x, BOTTOM - 80, half, 32, NORM, f"{norm}: RMSNorm {D:,}")
        sheet.path([(centre, BOTTOM - 80), (centre, BOTTOM - 102)])
    sheet.box(left, BOTTOM - 148, width, 46, ATTENTION, "eh_proj", f"[embedding, h] {2 * D:,} → {D:,}")
    sheet.path([(middle, BOTTOM - 148), (middle, BOTTOM - 166)])
    sheet.box(left, BOTTOM - 212, width, 46, EXPERTS, "one more MoE layer", "MLA and experts as in the stack")
    sheet.path([(middle, BOTTOM - 212), (middle, BOTTOM - 230)])
    sheet.box(left, BOTTOM - 262, width, 32, NORM, f"shared_head.norm: RMSNorm {D:,}")
    sheet.path([(middle, BOTTOM - 262), (middle, BOTTOM - 280)])
    sheet.box(left, BOTTOM - 326, width, 46, TABLE, "the model's own head", f"{D:,} → {V:,}")
    sheet.path([(middle, BOTTOM - 326), (middle, BOTTOM - 342)])
    sheet.text(middle + 12, BOTTOM - 332, "token i + 2", 12.5, MUTED)
