"""The CPU backend beyond the transformer: operators of the codec's decoder, of the text encoder and of int8, with every
instruction set in turn, and both programs against their networks in plain torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from presto_rt import native
from presto_rt.checkpoints.house import load_codec
from presto_rt.conditioning.minilm import load_text_encoder
from presto_rt.errors import BackendUnavailableError
from presto_rt.lab.evaluation.codec import measure
from presto_rt.loading import choose_precision, load
from presto_rt.models.codec import CodecConfig
from presto_rt.runtime.codec import CodecProgram, PackedDecoder, buffers, decoder_features
from presto_rt.runtime.cpu import autodtype
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.cpu.products import INT8_MIN_INPUTS, Int8Linear, int8_is_exact
from presto_rt.runtime.eager.ops import ACTIVATIONS, ReferenceOps
from presto_rt.runtime.memory import aliased, place
from presto_rt.runtime.text_encoder import TextProgram
from tests.support.codecs import random_codec

if native.lib is None:
    pytest.skip(f"no C++ operators: {native.why}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def int8_ops(dtype: torch.dtype, threads: int = 1) -> CpuOps:
    """Return a table with int8 products: oneDNN's where they are exact, else those in fp64."""
    return CpuOps(dtype, threads, int8=True, exact_int8=not int8_is_exact())


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.lib.isa()
    native.lib.use_isa(request.param)
    yield request.param
    native.lib.use_isa(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


each_isa = pytest.mark.parametrize("isa", native.lib.isas(), indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def unaligned(x: Tensor) -> Tensor:
    """The same numbers at an address that is a multiple of the element's size and of nothing more."""
    base = torch.empty(x.numel() + 17, dtype=x.dtype)
    start = next(i for i in range(1, 17) if (base.data_ptr() // x.element_size() + i) % 2)
    return base[start : start + x.numel()].view(x.shape).copy_(x)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return unaligned(torch.full(shape, float("nan"), dtype=dtype))


def close(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """got is at most twice as far from fp64 as plain torch: in the mean square with a unit of rounding to spare, in
    every element with four."""
    unit = UNIT[got.dtype] * float(exact.abs().max())
    ours, torchs = (x.double() - exact for x in (got, plain))
    assert ours.square().mean().sqrt() <= 2 * torchs.square().mean().sqrt() + unit
    assert ours.abs().max() <= 2 * torchs.abs().max() + 4 * unit


# ---- operators


@each_isa
@each_dtype
@pytest.mark.parametrize(("batch", "frames", "width"), [(1, 1, 1), (2, 2, 7), (3, 4, 72), (1, 37, 384), (2, 9, 1030)])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_mix_norm_is_near_fp64(isa: str, dtype: torch.dtype, batch: int, frames: int, width: int, threads: int) -> None:
    shape = batch, frames, width
    source, branch = torch.randn(shape) * 3 + 1, torch.randn(shape).to(dtype)
    mix, norm = torch.randn(5, width), (torch.rand(width) + 0.5, torch.randn(width))
    for given in (
        (source, branch, mix, norm),
        (None, branch, mix, norm),
        (source, None, None, norm),
        (source, branch, None, None),
    ):
        for after in (False, True) if given[3] is not None else (False,):
            results = []
            for ops, wide in (
                (CpuOps(dtype, threads), torch.float32),
                (ReferenceOps(dtype), torch.float32),
                (ReferenceOps(torch.float64), torch.float64),
            ):
                narrow = dtype if wide == torch.float32 else wide
                inputs = [
                    None if x is None else unaligned(x.to(k))
                    for x, k in zip(given[:3], (wide, narrow, wide), strict=True)
                ]
                scales = None if given[3] is None else tuple(unaligned(w.to(wide)) for w in given[3])
                residual, out = poisoned(*shape, dtype=wide), poisoned(*shape, dtype=narrow)
                ops.mix_norm(*inputs, scales, residual, out, 1e-5, after)
                results.append((residual, out))
            for got, plain, exact in zip(*results, strict=True):
                close(got, plain, exact)


@each_isa
@each_dtype
@pytest.mark.parametrize(("batch", "frames", "bands", "stride"), [(1, 1, 1, 3), (2, 5, 7, 32), (1, 9, 371, 1120)])
def test_features_are_near_fp64(isa: str, dtype: torch.dtype, batch: int, frames: int, bands: int, stride: int) -> None:
    halves = [torch.randn(batch, frames, stride).to(dtype) * 2 for _ in range(2)]
    mean, ceiling = torch.randn(2, bands) - 8, torch.randn(2, bands) - 7
    results = []
    for ops, wide in (
        (CpuOps(dtype, 3), torch.float32),
        (ReferenceOps(dtype), torch.float32),
        (ReferenceOps(torch.float64), torch.float64),
    ):
        inputs = [unaligned(x.to(dtype if wide == torch.float32 else wide)) for x in halves]
        out = poisoned(batch, frames, 3, bands, dtype=wide)
        results.append(ops.features(*inputs, mean.to(wide), ceiling.to(wide), 2.0, out))
    close(*results)
    assert (results[0][:, :, :2] <= ceiling).all()
    assert (results[0][:, :, 2].abs() <= 1).all()


@each_isa
@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 7), (33, 384), (3, 1537)])
def test_quantize_and_rescale_are_near_fp64(isa: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    x[0] = 0
    ops = int8_ops(dtype, 2)
    numbers, scale = ops.quantize(unaligned(x))
    torch.testing.assert_close(scale, x.float().abs().amax(1) / 127, rtol=1e-6, atol=0)
    steps = x.double() / scale.double()[:, None].clamp_min(1e-30)
    assert (numbers.double() - 128 - steps).abs().max() <= 0.5 + 1e-4  # to nearest; a tie may go either way
    bias, y = torch.randn(width), torch.randn(rows, width).to(dtype)
    for name in ("none", "gelu_tanh", "silu"):
        for added in (bias, None):
            shift = torch.zeros(width) if added is None else added
            got = ops.rescale(unaligned(y), scale, added, name)
            plain = ACTIVATIONS[name](y.float() * scale[:, None] + shift).to(dtype)
            exact = ACTIVATIONS[name](y.double() * scale.double()[:, None] + shift.double())
            close(got, plain, exact)


@each_isa
def test_operators_pass_on_values_that_are_not_finite(isa: str) -> None:
    for dtype in DTYPES:
        ops = int8_ops(dtype)
        for wild in (float("nan"), float("inf"), float("-inf")):
            x = torch.randn(1, 9, 40)
            x[0, 4, 11] = wild
            out, mix = torch.empty(1, 9, 40, dtype=dtype), torch.ones(5, 40)
            ops.mix_norm(x, None, mix, (torch.ones(40), torch.zeros(40)), None, out)
            assert out[0, 2:7].isnan().all()  # five frames see it
            assert out[0, :2].isfinite().all()
            assert out[0, 7:].isfinite().all()
            packed = ops.pack(torch.randn(24, INT8_MIN_INPUTS), torch.zeros(24))
            wide = torch.randn(1, 3, INT8_MIN_INPUTS).to(dtype)
            wide[0, 1, 7] = wild
            y = ops.linear(wide, packed, None)
            assert not y[0, 1].isfinite().any()
            assert y[0, ::2].isfinite().all()
            halves = torch.zeros(1, 2, 6, dtype=dtype), torch.zeros(1, 2, 6, dtype=dtype)
            halves[0][0, 1] = wild
            features = torch.empty(1, 2, 3, 2)
            ops.features(*halves, torch.zeros(2, 2), torch.full((2, 2), 5.0), 2.0, features)
            want = [wild, wild, torch.tanh(torch.tensor(wild)).item()] if wild < 0 else [5.0, 5.0, 1.0]
            want = [wild] * 3 if wild != wild else want
            torch.testing.assert_close(features[0, 1, :, 0], torch.tensor(want), equal_nan=True)


@each_isa
def test_mix_norm_keeps_subnormal_numbers(isa: str) -> None:
    tiny = torch.full((1, 3, 20), 1e-39)
    out, residual = torch.empty(1, 3, 20, dtype=torch.bfloat16), torch.empty(1, 3, 20)
    CpuOps(torch.bfloat16, 1).mix_norm(tiny, None, None, None, residual, out)
    assert torch.equal(residual, tiny)
    assert torch.equal(out, tiny.bfloat16())
    assert (out != 0).all()


def test_operators_check_sizes() -> None:
    ops = CpuOps(torch.float32, 1)
    x, norm = torch.zeros(1, 4, 8), (torch.ones(8), torch.zeros(8))
    with pytest.raises(ValueError, match="must not be the source"):
        ops.mix_norm(x, None, torch.zeros(5, 8), norm, x, x.clone())
    with pytest.raises(ValueError, match="contiguous"):
        ops.mix_norm(x, x[:, :3], None, norm, None, x.clone())
    with pytest.raises(ValueError, match="expected source or branch"):
        ops.mix_norm(None, None, None, norm, None, x.clone())
    with pytest.raises(ValueError, match="a weight to normalize with"):
        ops.mix_norm(x, None, None, None, x.clone(), x.clone(), after=True)
    with pytest.raises(ValueError, match="three of 3 bands"):
        ops.features(x, x, torch.zeros(2, 3), torch.zeros(2, 3), 2.0, torch.zeros(1, 4, 3, 3))


@each_dtype
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_linear_applies_its_activation(dtype: torch.dtype, activation: str) -> None:
    x, w, b = torch.randn(1, 29, 72).to(dtype), torch.randn(50, 72).to(dtype), torch.randn(50).to(dtype)
    ops, formula = CpuOps(dtype, 1), ACTIVATIONS[activation]
    exact = formula(F.linear(x.double(), w.double(), b.double()))
    close(ops.linear(x, ops.pack(w, b), None, activation), formula(F.linear(x, w, b)), exact)


# ---- int8


@each_dtype
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu"])
def test_int8_products_are_near_fp64(dtype: torch.dtype, activation: str) -> None:
    """Rounding both sides to 127 steps leaves an error of about a hundredth; whole tokens keep their own scale."""
    x, w, b = torch.randn(2, 31, 384), torch.randn(200, 384) / 20, torch.randn(200)
    x[0] *= 1000
    ops = int8_ops(dtype, 2)
    packed = ops.pack(w, b)
    assert isinstance(packed, Int8Linear)
    assert not isinstance(ops.pack(w[:, : INT8_MIN_INPUTS - 1], b), Int8Linear)
    got = ops.linear(x.to(dtype), packed, None, activation).double()
    exact = ACTIVATIONS[activation](F.linear(x.double(), w.double(), b.double()))
    for clip in range(2):
        error = (got - exact)[clip].square().mean().sqrt() / exact[clip].square().mean().sqrt()
        assert 1e-4 < error < 0.015


def test_int8_products_run_in_vectors() -> None:
    """Of signed activations oneDNN makes a reference loop on processors with VNNI and no AMX, 10,000 times slower."""
    if not int8_is_exact():
        pytest.skip("this processor has no VNNI")
    assert autodtype.matmul_rates()["int8"] > 0.3 * autodtype.matmul_rates()["float32"]


def test_int8_products_of_both_kinds_agree() -> None:
    """The exact product on any processor; oneDNN's equals it up to the rounding of the sums."""
    x, w, b = torch.randn(1, 31, 384), torch.randn(200, 384) / 20, torch.randn(200)
    exact = CpuOps(torch.float32, 1, int8=True, exact_int8=True)
    want = exact.linear(x, exact.pack(w, b), None)
    weight = exact.pack(w, b)
    assert isinstance(weight, Int8Linear)
    steps, scale = exact.quantize(x)
    sums = (steps.double() - 128) @ weight.weight.double().T
    by_hand = sums * scale.double()[:, None] * weight.scale.double() + b.double()
    torch.testing.assert_close(want[0].double(), by_hand, rtol=1e-5, atol=1e-5)
    if not int8_is_exact():
        with pytest.raises(BackendUnavailableError, match="VNNI"):
            CpuOps(torch.float32, 1, int8=True)
        return
    onednn = CpuOps(torch.float32, 1, int8=True)
    torch.testing.assert_close(onednn.linear(x, onednn.pack(w, b), None), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fp32", "bf16", "int8", "wanted"),
    [
        (200, 100, 750, "int8"),
        (200, 400, 800, "int8"),
        (200, 1600, 2300, "bfloat16"),
        (200, 100, 300, "float32"),
        (60, 0, 0, "float32"),
    ],
)
def test_preferred_dtype_is_the_fastest_here(
    monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, int8: float, wanted: str
) -> None:
    monkeypatch.setattr(autodtype, "matmul_rates", lambda: {"float32": fp32, "bfloat16": bf16, "int8": int8})
    monkeypatch.setattr(autodtype, "has_bf16", lambda: bf16 > 0)
    activations = torch.bfloat16 if bf16 > fp32 else torch.float32
    assert autodtype.preferred_dtype() == wanted
    assert autodtype.preferred_float() == activations
    assert autodtype.int8_is_faster() == (wanted == "int8")
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu, "cpu").name == wanted
    assert choose_precision("auto", cpu, "cpu").dtype == activations
    if wanted != "int8" or int8_is_exact():
        precision = load("tiny-random", device="cpu").backend.precision
        assert precision.name == wanted
        assert precision.dtype == activations
    assert load("tiny-random", device="cpu", backend="eager").backend.precision.name != "int8"
    assert load("tiny-random", device="cpu", dtype="float32").backend.precision.name == "float32"


def test_int8_needs_the_cpu_backend() -> None:
    with pytest.raises(BackendUnavailableError, match="int8"):
        load("nano", device="cpu", dtype="int8", backend="eager")


# ---- networks


Table = Callable[[torch.dtype], Any]
tables = pytest.mark.parametrize("table", [ReferenceOps, lambda dtype: CpuOps(dtype, 2)], ids=["reference", "cpu"])


@tables
@each_dtype
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 7), (1, 33)])
@torch.inference_mode()
def test_codec_program_equals_the_codec(table: Table, dtype: torch.dtype, batch: int, tokens: int) -> None:
    codec = random_codec()
    latents = torch.randn(batch, tokens, 64) * 0.5
    program = CodecProgram(codec, table(dtype))
    got, arena = program.features(latents), program.arena(batch, tokens)
    arena.block.fill_(0xFF)  # NaN in every dtype
    assert torch.equal(decoder_features(program.ops, program.weights, arena, latents, None), got)
    exact = copy.deepcopy(codec).double().decode_features(latents.double())
    if dtype == torch.float32:
        return close(got, codec.decode_features(latents), exact)
    rounded = copy.deepcopy(codec)
    rounded.decoder.to(dtype)
    plain = rounded.denormalize(rounded.decoder((latents / codec.latent_scale + codec.latent_mean).to(dtype)))
    plain[:, :, :2] = torch.minimum(plain[:, :, :2], codec.max_log_magnitude)
    # The features are fp32, so there is no unit of bf16 to spare: 1.2 times torch's error in the mean square.
    error, torchs = ((x.double() - exact).square().mean().sqrt() for x in (got, plain))
    assert error <= 1.2 * torchs


@tables
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_codec_buffers_that_are_alive_together_share_no_memory(table: Table, blocks: int) -> None:
    codec = random_codec(CodecConfig(decoder_blocks=blocks, frame_blocks=blocks))
    ops = table(torch.float32)
    listed = buffers(codec.config, PackedDecoder(codec, ops), 1, 9, ops)
    offsets = place(listed)
    assert aliased(listed, offsets) == []
    assert max(offsets[b.name] + b.size for b in listed) < sum(b.size for b in listed)


@tables
@each_dtype
@torch.inference_mode()
def test_text_program_equals_the_encoder(table: Table, dtype: torch.dtype) -> None:
    encoder = load_text_encoder()
    prompts = ["calm piano with warm strings, 84 bpm", "drums", "a " * 200]
    program = TextProgram(encoder, table(dtype))
    tokens = encoder.tokens(prompts, 96)
    padded = torch.tensor([row + [0] * (96 - len(row)) for row in tokens])
    padded_mask = torch.arange(96) < torch.tensor([[len(row)] for row in tokens])
    got = program(padded, padded_mask)
    assert torch.equal(program(padded, padded_mask), got)
    want = encoder.encode(prompts, 96)
    assert torch.equal(want.mask, padded_mask)
    ids = torch.tensor([encoder.tokenizer.encode(prompts[0]).ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    exact = copy.deepcopy(encoder).double()(ids, mask)
    plain = copy.deepcopy(encoder).to(dtype)(ids, mask)
    count = ids.shape[1]
    error, torchs = ((x.double() - exact).square().mean().sqrt() for x in (got[:1, :count], plain))
    assert error <= 2 * torchs + 1e-6
    pooled = (got * padded_mask[..., None]).sum(1) / padded_mask.sum(1, keepdim=True)
    assert (pooled - want.pooled).norm() / want.pooled.norm() < (1e-5 if dtype == torch.float32 else 0.01)


@torch.inference_mode()
def test_programs_give_ten_threads_the_results_that_each_gets_alone() -> None:
    codec, encoder = random_codec(), load_text_encoder()
    decoder, text = CodecProgram(codec, CpuOps(threads=2)), TextProgram(encoder, CpuOps(threads=2))
    requests = [(torch.randn(1, 5 + i % 3, 64), torch.randint(30_000, (1, 4 + i % 4))) for i in range(10)]

    def both(latents: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return decoder.features(latents), text(ids, torch.ones_like(ids, dtype=torch.bool))

    alone = [both(*request) for request in requests]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda request: both(*request), requests * 3))
    for i, got in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(got, alone[i % 10], strict=True))


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "int8"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_decode_in_bf16_and_int8_sounds_like_fp32(dtype: torch.dtype, int8: bool) -> None:
    """The shipped codec on the shipped model's latents, network in bf16 or int8 against fp32.

    Levels: 0.1 dB in the root mean square. Sound: phases follow from the levels and part for a rounding error, so that
    even 0.01 dB of noise on them gives 0.1 dB of log-mel distance; half of the 1 dB that is just noticeable is the
    limit.
    """
    codec, latents = load_codec("nano"), nano_latents()[None]
    exact = CodecProgram(codec, CpuOps(torch.float32, 2))
    rounded = CodecProgram(codec, int8_ops(dtype, 2) if int8 else CpuOps(dtype, 2))
    levels = (rounded.features(latents) - exact.features(latents))[:, :, :2].square().mean().sqrt() * 20 / math.log(10)
    assert 0 < levels < 0.1
    distances = measure(*(program.decode(latents)[0].clamp(-1.0, 1.0).numpy() for program in (exact, rounded)))
    assert 0 < distances["mel_db"] < 0.5


@cache
def nano_latents() -> Tensor:
    """Return latents (T, C) of the shipped model."""
    model = load("nano", device="cpu", threads=2)
    audio = model.generate("calm piano with warm strings, 84 bpm", seconds=6.0, steps=6, seed=3)
    assert audio.latents is not None
    return audio.latents
