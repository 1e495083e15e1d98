"""What `Stem` promises, as checks."""

from __future__ import annotations

import copy
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from hybridvit import build
from hybridvit.analysis.leakage import leakage, mixing
from hybridvit.conformance.suite import (
    MODES,
    Suite,
    batch,
    check_copy,
    check_gradients,
    check_meta,
    check_state,
    enliven,
    generators_moved,
    global_states,
    noise,
    on,
    one_objective,
    relative,
    require,
    seeded,
)
from hybridvit.contracts import Stem, Tokens
from hybridvit.patches import grid_of, patchify, take, unpatchify

DIM = 64
LEAST_SIDE = 32  # pixels: what a stem of small stride is tried on
SAME = 1e-5  # relative difference that rounding explains


class StemConformance(Suite):
    """A stem's checks; `class TestMine(StemConformance): factory = MyStem` runs them in pytest."""

    registry = "stems"
    gates = ("test_builds", "test_tokens")

    def test_builds(self) -> None:
        self.check_arguments()
        stem = self.fresh()
        require(isinstance(stem, Stem), f"is {type(stem).__name__}: derive it from Stem")
        px = getattr(stem, "patch_px", None)
        require(
            type(px) is int and px >= 1,
            f"declares patch_px={px!r}: set self.patch_px, the total stride in pixels, an int",
        )
        for name in ("is_patch_local", "couples_batch"):
            value = getattr(stem, name)
            require(type(value) is bool, f"declares {name}={value!r}: set True or False")

    def test_tokens(self) -> None:
        for dim in (DIM, 96):
            stem = self.fresh(dim=dim)
            size = sized(stem, 4, 6)
            check_tokens(stem(noise(2, 3, *size)), stem, size, dim)

    def test_other_image_sizes(self) -> None:
        stem = self.fresh()
        for rows, columns in ((4, 4), (6, 4), (8, 6)):
            size = sized(stem, rows, columns)
            with on(f"{size[0]} x {size[1]} px"):
                check_tokens(stem(noise(1, 3, *size)), stem, size, DIM)

    def test_order_of_tokens(self) -> None:
        """Editing a patch moves the tokens around its place, and most itself."""
        stem = self.lively().eval()
        grid, offsets = (6, 8), []
        for place in ((1, 6), (4, 2), (4, 6), (1, 2), (2, 4), (3, 5)):
            middle = middle_of_change(stem, grid, place)
            require(
                middle is not None,
                f"no token shows what patch {place} of {grid[0]} x {grid[1]} holds: is "
                f"patch_px={stem.patch_px} the true stride?",
            )
            assert middle is not None
            offset = middle[0] - place[0], middle[1] - place[1]
            hint = f"give tokens in row-major order, x.flatten(2).mT, {stem.patch_px} px apart"
            require(
                max(map(abs, offset)) < 1.5,
                f"editing patch {place} of {grid[0]} x {grid[1]} moves tokens around "
                f"({middle[0]:.1f}, {middle[1]:.1f}): {hint}",
            )
            offsets.append(offset)
        # A stride of 2 puts a token at the corner of its patch: half a patch is no mistake.
        row, column = (sum(o[axis] for o in offsets) / len(offsets) for axis in (0, 1))
        require(
            max(abs(row), abs(column)) < 0.7,
            f"tokens lie ({row:.1f}, {column:.1f}) patches beside theirs on average: {hint}",
        )

    def test_patch_locality(self) -> None:
        stem = self.lively()
        images = noise(2, 3, *sized(stem, 4, 6))
        found = [mixing(stem, images, training=m, threshold=SAME) for m in MODES.values()]
        for mode, mixed in zip(MODES, found, strict=True):
            count = mixed.moved * mixed.tokens
            require(count > 0, f"editing a patch moves no token in {mode} mode")
            require(
                not stem.is_patch_local or (count < 1.01 and mixed.jacobian_outside == 0),
                f"declares is_patch_local=True, but in {mode} mode editing one patch moves "
                f"{count:.3g} of {mixed.tokens} tokens, and {mixed.jacobian_outside:.1%} of a "
                "token's squared gradient is outside its patch: declare False, or let no "
                "convolution overlap and no norm take statistics over positions",
            )
        alone = all(m.moved * m.tokens < 1.01 and m.jacobian_outside == 0 for m in found)
        require(
            stem.is_patch_local or not alone or not position_independent(stem),
            "declares is_patch_local=False, but each token depends on the pixels of its patch "
            "alone: declare True, so that hidden patches are not computed and reports call it pure",
        )

    def test_position_independence(self) -> None:
        stem = self.lively().eval()
        if not stem.is_patch_local:
            self.note = "nothing to check: not patch-local"
            return
        require(
            position_independent(stem),
            "declares is_patch_local=True, but a patch gives another token at another place: "
            "add no positions (the encoder does), and take images of any grid, such as 1 x 5",
        )

    def test_batch_coupling(self) -> None:
        stem = self.lively().train()
        gap = gap_to_neighbours(stem)
        require(
            (gap > SAME) == stem.couples_batch,
            f"declares couples_batch={stem.couples_batch}, but in train mode an image's tokens "
            f"{'change' if gap > SAME else 'do not change'} with the other images ({gap:.1%}): "
            f"declare {gap > SAME}",
        )
        gap = gap_to_neighbours(stem.eval())
        require(
            gap <= SAME,
            f"in eval mode an image's tokens change with the other images ({gap:.1%}): use "
            "running statistics there, as BatchNorm does",
        )

    def test_gradients(self) -> None:
        stem = self.lively().train()
        if not any(p.requires_grad for p in stem.parameters()):
            self.note = "has no trainable parameters"
            return
        x = stem(noise(4, 3, *sized(stem, 4, 6))).x
        (x * noise(*x.shape, seed=2)).sum().backward()
        check_gradients(stem)

    def test_hidden_pixels(self) -> None:
        """Masked objectives on the stem hide what they hide, exactly."""
        stem = self.fresh()
        size = sized(stem, 4, 6)
        for name, args in masked_objectives(stem.patch_px).items():
            objective = one_objective(self.parts, (name, args), (self.name, self.args), size)
            enliven(objective)
            for mode, training in MODES.items():
                with on(f"{name}, {mode} mode"):
                    prediction = objective.train(training).predict(batch(size))
                    assert prediction is not None
                    for x in (prediction.tokens, prediction.outputs):
                        require(x.isfinite().all(), "tokens or predictions are not finite")
                    found = leakage(objective, batch(size), training=training)
                    assert found is not None
                    require(isfinite(found.gradient), "gradients are not finite")
                    require(
                        found.is_zero,
                        f"{found.tokens:.0%} of the tokens and {found.outputs:.0%} of the "
                        "predictions change with hidden pixels, which are filled before the stem: "
                        "keep nothing of an image between calls and draw nothing at random",
                    )

    def test_visible(self) -> None:
        """`visible` changes nothing where all is visible, and leaves tokens finite elsewhere."""
        for mode, training in MODES.items():
            stem = self.lively().train(training)
            images = noise(2, 3, *sized(stem, 4, 6))
            grid = grid_of(images.shape[-2:], stem.patch_px)
            everything = torch.ones(2, *grid, dtype=torch.bool)
            gap = relative(quiet(stem, images, everything), quiet(stem, images))
            require(
                gap <= SAME,
                f"in {mode} mode tokens with all patches visible differ from those without "
                f"`visible` ({gap:.1%}): True stands for a patch that is shown",
            )
            some = torch.rand(everything.shape, generator=torch.Generator().manual_seed(3)) < 0.5
            with on(f"half of the patches visible, {mode} mode"):
                check_tokens(stem(images, some), stem, images.shape[-2:], DIM)

    def test_bf16(self) -> None:
        stem = self.lively().train()
        images = noise(4, 3, *sized(stem, 4, 6))
        with on("bf16 autocast"):
            with torch.autocast("cpu", torch.bfloat16):
                x = stem(images).x
            require(x.isfinite().all(), "tokens are not finite")
            if x.requires_grad:
                (x.float() * noise(*x.shape, seed=2)).sum().backward()
            check_gradients(stem, reached=False)

    def test_constant_images(self) -> None:
        for mode, training in MODES.items():
            stem = self.lively().train(training)
            size = sized(stem, 4, 6)
            images = torch.tensor([0.0, -2.0, 2.0])[:, None, None, None].expand(-1, 3, *size)
            x = stem(images.contiguous()).x
            hint = "add an epsilon, inside the root, where you divide by a deviation"
            require(
                x.isfinite().all(),
                f"tokens of constant images are not finite in {mode} mode: {hint}",
            )
            if x.requires_grad:
                x.sum().backward()
            with on(f"constant images, {mode} mode; {hint}"):
                check_gradients(stem, reached=False)

    def test_input_is_kept(self) -> None:
        stem = self.lively().train()
        images = noise(2, 3, *sized(stem, 4, 6))
        grid = grid_of(images.shape[-2:], stem.patch_px)
        visible = torch.rand(2, *grid, generator=torch.Generator().manual_seed(3)) < 0.5
        before = images.clone(), visible.clone()
        with torch.no_grad():
            stem(images, visible)
        same = torch.equal(images, before[0]) and torch.equal(visible, before[1])
        require(same, "changes its input in place: others use it, too; copy first")

    def test_compile(self) -> None:
        stem = self.lively().eval()
        images = noise(2, 3, *sized(stem, 4, 6))
        torch.compiler.reset()
        compiled = torch.compile(stem, backend="eager", fullgraph=True)
        with torch.no_grad(), on("torch.compile(fullgraph=True)"):
            gap = relative(compiled(images).x, stem(images).x)
        require(gap <= SAME, f"tokens differ once compiled ({gap:.1%})")

    def test_checkpoint(self) -> None:
        stem, fresh = self.lively(), self.fresh(seed=1)
        images = noise(2, 3, *sized(stem, 4, 6))
        for _ in range(2):  # running statistics move
            stem.train()(images)
        check_state(stem, fresh, partial(shown, images=images))

    def test_copy(self) -> None:
        stem = self.lively().train()
        images = noise(2, 3, *sized(stem, 4, 6))
        x = stem(images).x
        if x.requires_grad:
            x.sum().backward()
        check_copy(stem, partial(shown, images=images))

    def test_determinism(self) -> None:
        """Weights come from torch's seed; evaluation draws nothing, training from torch alone."""
        first, second = self.fresh(), self.fresh()
        images = noise(2, 3, *sized(first, 4, 6))
        require(
            torch.equal(shown(first, images), shown(second, images)),
            "built twice with one seed, it differs: draw weights from torch's global generator",
        )
        stem = first.eval()
        tokens = []
        for seed in (1, 2):
            with seeded(seed), torch.no_grad():
                tokens.append(stem(images).x)
                stem(2 * images + 1)
        require(
            torch.equal(*tokens),
            "the same images twice give other tokens in eval mode: keep nothing of an image "
            "between calls, and draw nothing at random there",
        )
        stem = self.fresh().train()
        require(
            torch.equal(quiet(stem, images), quiet(stem, images)),
            "the same images twice give other tokens in train mode, though torch's seed is the "
            "same: draw from torch's global generator alone",
        )
        for mode, allowed in (("train", {"torch"}), ("eval", set())):
            stem = self.fresh().train(MODES[mode])
            with seeded(0):
                states = global_states()
                stem(images)
                moved = set(generators_moved(states)) - allowed
            require(
                not moved,
                f"draws from the global generator of {' and '.join(sorted(moved))} in {mode} mode: "
                "training may draw from torch's, evaluation from none",
            )

    def test_device(self) -> None:
        stem = self.fresh().eval()
        images = torch.empty(2, 3, *sized(stem, 4, 6), device="meta")
        self.note = check_meta(lambda: copy.deepcopy(stem).to("meta")(images))

    def fresh(self, *, dim: int = DIM, seed: int = 0) -> Stem:
        """The stem as a run would build it."""
        with build.seeded(seed, "conformance"):
            stem: Stem = self.parts.stems.build(self.name, dict(self.args), dim=dim)
        return stem

    def lively(self) -> Stem:
        """The stem with weights that all matter."""
        stem = self.fresh()
        enliven(stem)
        return stem


def masked_objectives(patch_px: int) -> dict[str, dict[str, Any]]:
    """Small objectives that hide patches, by name."""
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    # Pixels are normalised over windows, and one pixel has no deviation.
    return {
        "masked_patch": {},
        "mae": {**decoder, "ratio": 0.5, "target_patch": max(2, patch_px)},
    }


def sized(stem: Stem, rows: int, columns: int) -> tuple[int, int]:
    """(H, W) of rows x columns patches, or of some times as many where patches are small."""
    p = stem.patch_px
    unit = p * max(1, LEAST_SIDE // (4 * p))
    return rows * unit, columns * unit


def shown(stem: Stem, images: Tensor) -> Tensor:
    """Tokens in eval mode."""
    with torch.no_grad(), seeded(0):
        x: Tensor = stem.eval()(images).x
    return x


@torch.no_grad()
def quiet(stem: Stem, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Tokens of a copy, in its mode, with the global generators seeded."""
    with seeded(0):
        x: Tensor = copy.deepcopy(stem)(images, visible).x
    return x


def gap_to_neighbours(stem: Stem) -> float:
    """How far an image's tokens move, relatively, when the other images of its batch change."""
    images = noise(3, 3, *sized(stem, 4, 6))
    others = torch.cat([images[:1], 2 * noise(2, 3, *images.shape[2:], seed=2) + 1])
    return relative(quiet(stem, images)[0], quiet(stem, others)[0])


def middle_of_change(
    stem: Stem, grid: tuple[int, int], place: tuple[int, int]
) -> tuple[float, float] | None:
    """Where tokens move, in rows and columns, when the patch at a place is edited."""
    p, (i, j), (rows, columns) = stem.patch_px, place, grid
    images = noise(1, 3, rows * p, columns * p)
    edited = images.clone()
    edited[..., i * p : (i + 1) * p, j * p : (j + 1) * p] = noise(3, p, p, seed=i + j)
    with torch.no_grad():
        moved = (stem(edited).x - stem(images).x)[0].double().square().sum(dim=-1)
    # Statistics of the image move all tokens a little; less that, what is near remains.
    weight = (moved - moved.median()).clamp(min=0).view(rows, columns)
    if not weight.sum() > 0:
        return None
    weight = weight / weight.sum()
    row = (weight.sum(dim=1) * torch.arange(rows)).sum()
    column = (weight.sum(dim=0) * torch.arange(columns)).sum()
    return float(row), float(column)


def position_independent(stem: Stem) -> bool:
    """Whether patches side by side, in another order, give the tokens that they give in place."""
    images, p = noise(2, 3, *sized(stem, 4, 6)), stem.patch_px
    patches = patchify(images, p)
    keep = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(4))[:5]
    index = keep.expand(2, -1)
    strip = unpatchify(take(patches, index), (1, len(keep)), p)
    with torch.no_grad():
        together = take(stem.eval()(images).x, index)
        with on(f"patches side by side, {strip.shape[-2]} x {strip.shape[-1]} px"):
            apart = stem(strip).x
    return apart.shape == together.shape and relative(apart, together) <= 1e-4


def check_tokens(tokens: Tokens, stem: Stem, size: tuple[int, ...], dim: int) -> None:
    """Type, shape, order and content of tokens for images of (H, W)."""
    require(
        isinstance(tokens, Tokens),
        f"gives {type(tokens).__name__}: return Tokens(x, (h, w))",
    )
    p, x = stem.patch_px, tokens.x
    grid = size[0] // p, size[1] // p
    told = f"declares patch_px={p}, hence a grid of {grid} for {size[0]} x {size[1]} px"
    require(tuple(tokens.grid) == grid, f"{told}, but gives grid {tuple(tokens.grid)}")
    require(
        x.ndim == 3 and tuple(x.shape[1:]) == (grid[0] * grid[1], dim),
        f"{told} and x (B, {grid[0] * grid[1]}, {dim}) for dim={dim}, but gives x "
        f"{tuple(x.shape)}: no class token, no other width",
    )
    require(tokens.index is None, "gives an index: return all tokens, in order")
    require(x.dtype == torch.float32, f"gives {x.dtype} for torch.float32 images")
    require(x.isfinite().all(), "gives tokens that are not finite")
