"""The codec's program: one masked decode for all backends, against the codec in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from presto_rt import native
from presto_rt.models.spectral import LATENT_HOP
from presto_rt.runtime.codec import CodecProgram, decoder_features, limit_peak, valid_mask
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.cuda.ops import CudaOps
from presto_rt.runtime.eager.ops import ReferenceOps
from tests.support.codecs import random_codec, relative_rms

needs_native = pytest.mark.skipif(native.lib is None, reason=f"no C++ operators: {native.why}")
MASKING = {
    "reference": ReferenceOps,
    "cuda, torch": lambda: CudaOps(torch.float32, "cpu", backend="torch"),
}
each_masking = pytest.mark.parametrize("table", list(MASKING))
each_griffin_lim = pytest.mark.parametrize("griffin_lim", [0, 3])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@each_masking
@each_griffin_lim
@torch.inference_mode()
def test_masked_decode_of_a_shorter_clip_is_the_clip_alone(table: str, griffin_lim: int) -> None:
    """Whatever lies beyond its end: nothing of it is heard, and the samples there are 0."""
    codec = random_codec(griffin_lim=griffin_lim)
    program = CodecProgram(codec, MASKING[table]())
    lengths, frames = [5, 9, 1], 9
    latents = torch.randn(3, frames, 64) * 0.5
    arena = program.arena(3, frames)
    arena.block.fill_(0xFF)  # NaN in every dtype
    got = program.masked_decode(arena, latents, torch.tensor(lengths, dtype=torch.int32))
    assert got.shape == (3, 2, frames * LATENT_HOP)
    changed = latents.clone()
    for clip, length in enumerate(lengths):
        changed[clip, length:] = 7.0
        assert torch.equal(got[clip, :, length * LATENT_HOP :], torch.zeros(2, (frames - length) * LATENT_HOP))
        alone = program.decode(latents[clip : clip + 1, :length])[0]
        assert float(alone.square().mean()) > 0
        assert relative_rms(got[clip, :, : length * LATENT_HOP], alone) < 1e-4
    arena.block.fill_(0xFF)
    again = program.masked_decode(arena, changed, torch.tensor(lengths, dtype=torch.int32))
    for clip, length in enumerate(lengths):
        cut = slice(0, length * LATENT_HOP)
        assert relative_rms(again[clip, :, cut], got[clip, :, cut]) < 1e-6


@torch.inference_mode()
def test_masked_decode_without_its_mask_is_another_sound() -> None:
    """So the mask has an effect: latents beyond the end reach the samples before it."""
    program = CodecProgram(random_codec(), ReferenceOps())
    latents = torch.randn(1, 9, 64) * 0.5
    alone = program.decode(latents[:, :5])
    assert relative_rms(program.decode(latents)[..., : 5 * LATENT_HOP], alone) > 0.01


@each_masking
@each_griffin_lim
@torch.inference_mode()
def test_decode_equals_the_codec(table: str, griffin_lim: int) -> None:
    codec = random_codec(griffin_lim=griffin_lim)
    latents = torch.randn(2, 7, 64) * 0.5
    assert (
        relative_rms(CodecProgram(codec, MASKING[table]()).decode(latents), codec.decode(latents, clamp=False)) < 1e-4
    )


@needs_native
@each_griffin_lim
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_decode_on_a_cpu_equals_the_codec(griffin_lim: int, threads: int) -> None:
    codec = random_codec(griffin_lim=griffin_lim)
    latents = torch.randn(1, 7, 64) * 0.5
    got = CodecProgram(codec, CpuOps(torch.float32, threads)).decode(latents)
    assert got.shape == (1, 2, 7 * LATENT_HOP)
    assert relative_rms(got, codec.decode(latents, clamp=False)) < 1e-4


@needs_native
def test_masks_on_a_cpu_are_refused() -> None:
    program = CodecProgram(random_codec(), CpuOps(torch.float32, 1))
    with pytest.raises(ValueError, match="lengths"):
        program.masked_decode(program.arena(1, 4), torch.zeros(1, 4, 64), torch.tensor([3], dtype=torch.int32))


@each_masking
@torch.inference_mode()
def test_decoder_features_read_no_frame_beyond_the_end(table: str) -> None:
    program = CodecProgram(random_codec(), MASKING[table]())
    latents = torch.randn(1, 8, 64)
    arena = program.arena(1, 8)

    def features(latents: Tensor) -> Tensor:
        arena.block.fill_(0xFF)
        length = torch.tensor([3], dtype=torch.int32)
        return decoder_features(program.ops, program.weights, arena, latents, length)[:, :12].clone()

    first = features(latents)
    changed = latents.clone()
    changed[:, 3:] += 1
    assert torch.equal(features(changed), first)
    torch.testing.assert_close(first, program.features(latents[:, :3]), rtol=1e-4, atol=1e-4)


def test_program_leaves_the_codec_where_it_is() -> None:
    """Its encoder stays in use: the tensors that both need are copied, not moved."""
    codec = random_codec()
    program = CodecProgram(codec, ReferenceOps(device="meta"))
    assert program.frames.window.is_meta
    assert not codec.frames.window.is_meta
    assert codec.encode(torch.randn(1, 2, 5000)).shape == (1, 3, 64)


def test_valid_mask_is_one_before_each_length() -> None:
    want = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert valid_mask(4, torch.tensor([1, 4, 0])).tolist() == want


def test_limit_peak_scales_whole_clips_by_their_valid_samples() -> None:
    clips = torch.tensor([[[0.5, -1.96, 9.0]], [[0.1, 0.2, 9.0]], [[0.98, 0.0, 0.0]]])
    got = limit_peak(clips, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(got[0], clips[0] / 2)
    assert torch.equal(got[1:], clips[1:])
    assert float(limit_peak(clips).abs().amax()) == pytest.approx(0.98)
