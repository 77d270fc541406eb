"""The codec's decoder over fused operators and static buffers: one masked decode for all backends.

Between two matrix products of a block there is one operator: residual sum, mix of five frames and layer norm. SiLU is
part of the product before it. The latents' scale and mean are folded into the first weights; the last operator adds the
two halves of the decoder, undoes the features' normalization and limits the log-magnitudes. The residual stays fp32.

A clip may be shorter than the buffer it lies in: frames beyond its end are zero wherever a frame reads its neighbours,
so the samples are those of the clip alone. No value is read on the host, so that a CUDA graph can capture all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.codec import Block, Codec, CodecConfig
from ..models.spectral import FRAMES_PER_LATENT
from .memory import Arena, Buffer, Pool
from .ops import Ops, PackedLinear

PEAK = 0.98  # of full scale


@dataclass(frozen=True)
class PackedMixBlock:
    """One residual block: depthwise filter over time, layer norm, two-layer MLP."""

    mix: Tensor
    norm: tuple[Tensor, Tensor]
    up: PackedLinear
    down: PackedLinear


def layer_norm_weights(layer: nn.LayerNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer norm in fp32 on a device, apart from the layer's own."""
    weight, bias = (x.detach().to(device, torch.float32, copy=True) for x in (layer.weight, layer.bias))
    return weight, bias


def pack_linear(ops: Ops, layer: nn.Linear) -> PackedLinear:
    """Return a layer's weights, packed for a table of operators."""
    return ops.pack(layer.weight.detach().float(), layer.bias.detach().float())


class PackedDecoder:
    """The decoder's weights, packed for a table of operators.

    row: numbers in a row of the last products, 3 bands rounded up to whole cache lines.
    """

    def __init__(self, codec: Codec, ops: Ops) -> None:
        decoder, bands, device = codec.decoder, codec.frames.bands, ops.device
        self.bands, self.row = bands, -(-3 * bands // 32) * 32
        scale, mean = codec.latent_scale.double(), codec.latent_mean.double()

        def fold_scale(layer: nn.Linear) -> tuple[Tensor, Tensor]:
            """Weights for latents, from those for (latents / scale + mean)."""
            weight = layer.weight.detach().double()
            return (weight / scale).float(), (layer.bias.detach().double() + weight @ mean).float()

        def pad_rows(x: Tensor, parts: int) -> Tensor:
            """Append zeros to the 3 bands of each of `parts` frames."""
            padded = x.new_zeros(parts, self.row, *x.shape[1:])
            padded[:, : 3 * bands] = x.unflatten(0, (parts, 3 * bands))
            return padded.flatten(0, 1)

        linear = fold_scale(decoder.linear)
        self.linear = ops.pack(*(pad_rows(x, FRAMES_PER_LATENT) for x in linear))
        self.stem = ops.pack(*fold_scale(decoder.stem))
        self.blocks = [self._block(block, ops) for block in decoder.blocks]
        self.split = pack_linear(ops, decoder.split)
        self.frame_blocks = [self._block(block, ops) for block in decoder.frame_blocks]
        self.norm = layer_norm_weights(decoder.norm, device)
        head = decoder.head.weight, decoder.head.bias
        self.head = ops.pack(*(pad_rows(x.detach().float(), 1) for x in head))
        self.mean, self.max_log_magnitude = (
            x.detach().to(device, torch.float32, copy=True) for x in (codec.feature_mean, codec.max_log_magnitude)
        )
        self.scale = 1.0 / codec.feature_scale
        self.expansion = [self._expansion(blocks) for blocks in (decoder.blocks, decoder.frame_blocks)]

    @staticmethod
    def _block(block: nn.Module, ops: Ops) -> PackedMixBlock:
        assert isinstance(block, Block)
        mix = block.mix.detach().to(ops.device, torch.float32, copy=True)
        norm = layer_norm_weights(block.norm, ops.device)
        return PackedMixBlock(mix, norm, pack_linear(ops, block.up), pack_linear(ops, block.down))

    @staticmethod
    def _expansion(blocks: nn.Sequential) -> int:
        """Hidden width of a block's MLP over its width."""
        first = next((block for block in blocks if isinstance(block, Block)), None)
        return 1 if first is None else first.up.out_features // first.up.in_features


# Positions in the forward pass, for the buffers' life times. A block's are the same for every block.
INPUT, STEM, MIX, UP, DOWN, LAST, SPLIT, FRAME_MIX, FRAME_UP, FRAME_DOWN, FRAME_LAST, HEAD, FEATURES = range(13)


def buffers(config: CodecConfig, weights: PackedDecoder, batch: int, latents: int, ops: Ops) -> list[Buffer]:
    """Return every buffer that a pass writes, with its life time.

    Args:
        config: sizes of the codec.
        weights: packed for `ops`.
        batch: clips.
        latents: latent frames.
        ops: table of operators.
    """
    c, frames, dtype, f32 = config, FRAMES_PER_LATENT * latents, ops.dtype, torch.float32
    width, frame_width = c.decoder_width, c.frame_width
    listed = [
        Buffer("input", (batch, latents, c.latent_channels), dtype, ((INPUT, STEM),)),
        Buffer("residual0", (batch, latents, width), f32, ((MIX, LAST),)),
        Buffer("residual1", (batch, latents, width), f32, ((MIX, LAST),)),
        Buffer("normed", (batch, latents, width), dtype, ((MIX, UP), (LAST, SPLIT))),
        Buffer("frame_residual0", (batch, frames, frame_width), f32, ((FRAME_MIX, FRAME_LAST),)),
        Buffer("frame_residual1", (batch, frames, frame_width), f32, ((FRAME_MIX, FRAME_LAST),)),
        Buffer("frame_normed", (batch, frames, frame_width), dtype, ((FRAME_MIX, FRAME_UP), (FRAME_LAST, HEAD))),
        Buffer("features", (batch, frames, 3, weights.bands), f32, ((FEATURES, FEATURES),)),
    ]
    if not ops.capabilities.allocates_matmul_output:
        hidden, frame_hidden = (e * w for e, w in zip(weights.expansion, (width, frame_width), strict=True))
        listed += [
            Buffer("linear", (batch, latents, FRAMES_PER_LATENT * weights.row), dtype, ((INPUT, FEATURES),)),
            Buffer("branch", (batch, latents, width), dtype, ((STEM, LAST),)),
            Buffer("hidden", (batch, latents, hidden), dtype, ((UP, DOWN),)),
            Buffer("split", (batch, latents, FRAMES_PER_LATENT * frame_width), dtype, ((SPLIT, FRAME_MIX),)),
            Buffer("frame_branch", (batch, frames, frame_width), dtype, ((FRAME_MIX, FRAME_LAST),)),
            Buffer("frame_hidden", (batch, frames, frame_hidden), dtype, ((FRAME_UP, FRAME_DOWN),)),
            Buffer("head", (batch, frames, weights.row), dtype, ((HEAD, FEATURES),)),
        ]
    return listed


def decoder_features(ops: Ops, w: PackedDecoder, arena: Arena, latents: Tensor, lengths: Tensor | None) -> Tensor:
    """Return features (B, 4 T, 3, bands) fp32 of latents (B, T, C), a view of the arena.

    Args:
        ops: table of operators.
        w: weights packed for it.
        arena: of `buffers`.
        latents: (B, T, C) fp32.
        lengths: (B,) int32 valid latent frames, or None for all.
    """

    def run(
        blocks: Sequence[PackedMixBlock], branch: Tensor, prefix: str, lengths: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        source, normed = None, arena.tensor(f"{prefix}normed")
        for i, block in enumerate(blocks):
            residual = arena.tensor(f"{prefix}residual{i % 2}")
            ops.mix_norm(source, branch, block.mix, block.norm, residual, normed, lengths=lengths)
            hidden = ops.linear(normed, block.up, arena.find(f"{prefix}hidden"), "silu")
            branch = ops.linear(hidden, block.down, arena.find(f"{prefix}branch"))
            source = residual
        return source, branch

    batch, frames = len(latents), FRAMES_PER_LATENT * latents.shape[1]
    x = arena.tensor("input").copy_(latents)
    linear = ops.linear(x, w.linear, arena.find("linear"))
    source, branch = run(w.blocks, ops.linear(x, w.stem, arena.find("branch")), "", lengths)
    normed = ops.mix_norm(source, branch, None, None, None, arena.tensor("normed"))
    split = ops.linear(normed, w.split, arena.find("split"))
    frame_lengths = None if lengths is None else FRAMES_PER_LATENT * lengths
    source, branch = run(w.frame_blocks, split.view(batch, frames, -1), "frame_", frame_lengths)
    normed = ops.mix_norm(source, branch, None, w.norm, None, arena.tensor("frame_normed"))
    head = ops.linear(normed, w.head, arena.find("head"))
    linear = linear.view(batch, frames, w.row)
    return ops.features(head, linear, w.mean, w.max_log_magnitude, w.scale, arena.tensor("features"))


class CodecProgram:
    """The codec's decoder, ready to run. Any number of threads may call it; each has its own memory meanwhile.

    Args:
        codec: in fp32.
        ops: table of operators.
    """

    def __init__(self, codec: Codec, ops: Ops) -> None:
        self.config, self.ops = codec.config, ops
        self.frames = copy.deepcopy(codec.frames).to(ops.device)  # the codec's encoder stays where it is
        self.gain = codec.synthesis_gain.detach().to(ops.device, torch.float32, copy=True)
        self.weights = PackedDecoder(codec, ops)
        self.pool: Pool[Arena] = Pool()

    def arena(self, batch: int, latents: int) -> Arena:
        """Return static memory for `batch` clips of `latents` latent frames."""
        return Arena(buffers(self.config, self.weights, batch, latents, self.ops), self.ops.device)

    def features(self, latents: Tensor) -> Tensor:
        """Return features (B, 4 T, 3, bands) fp32 of latents (B, T, C) fp32."""
        batch, frames = latents.shape[:2]
        with torch.inference_mode(), self.pool.take((batch, frames), lambda: self.arena(batch, frames)) as arena:
            return decoder_features(self.ops, self.weights, arena, latents, None).clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Return stereo samples (B, 2, 2048 T) fp32 of latents (B, T, C) fp32, not clamped."""
        batch, frames = latents.shape[:2]
        with torch.inference_mode(), self.pool.take((batch, frames), lambda: self.arena(batch, frames)) as arena:
            return self.masked_decode(arena, latents)

    def masked_decode(self, arena: Arena, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return stereo samples (B, 2, 2048 T) fp32, not clamped, zero beyond each clip's end.

        Args:
            arena: static memory of these sizes.
            latents: (B, T, C) fp32.
            lengths: (B,) int32 valid latent frames; None for all.
        """
        features = decoder_features(self.ops, self.weights, arena, latents, lengths)
        frame_lengths = None if lengths is None else FRAMES_PER_LATENT * lengths
        return self.ops.synthesize(self.frames, features, self.gain, self.config.griffin_lim, frame_lengths)


def valid_mask(count: int, lengths: Tensor) -> Tensor:
    """Return (B, count) fp32: 1 before each clip's length, 0 from there on."""
    return (torch.arange(count, device=lengths.device) < lengths[:, None]).float()


def limit_peak(samples: Tensor, lengths: Tensor | None = None, peak: float = PEAK) -> Tensor:
    """Scale each clip (B, 2, N) whose peak is over `peak` down to it, as a whole: clipping would be audible.

    lengths: (B,) valid samples of each clip; None for all.
    """
    inside = samples if lengths is None else samples * valid_mask(samples.shape[2], lengths)[:, None]
    return samples / (inside.abs().amax((1, 2), keepdim=True) / peak).clamp_min(1.0)
