"""The codec: shapes, lengths, determinism, phase inversion, work per audio second."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from presto_rt import native
from presto_rt.checkpoints.folder import load_folder
from presto_rt.checkpoints.house import load_codec
from presto_rt.errors import GenerationError, InvalidInputError
from presto_rt.models.codec import Codec, CodecConfig
from presto_rt.models.spectral import FRAME_HOP, LATENT_HOP, N_FFT, SAMPLE_RATE, SpectralFrames, mel_filters, spsi_numpy

SMALL = CodecConfig(
    encoder_width=32, encoder_blocks=1, decoder_width=32, decoder_blocks=1, frame_width=16, frame_blocks=1
)


@pytest.fixture(scope="module")
def frames() -> SpectralFrames:
    return SpectralFrames(2500.0)


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    return Codec(SMALL).eval()


def tones(seconds: float, left_hz: float, right_hz: float) -> torch.Tensor:
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pair = [0.4 * torch.sin(2 * torch.pi * hz * time) for hz in (left_hz, right_hz)]
    return torch.stack(pair)[None]


def peak_hz(samples: torch.Tensor) -> float:
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle)), n=1 << 18).abs()
    return float(spectrum.argmax()) * SAMPLE_RATE / (1 << 18)


@pytest.mark.parametrize("count", [1, 777, 2047, 2048, 2049, 44101])
def test_codec_gives_back_every_length(codec: Codec, count: int) -> None:
    latents = codec.encode(torch.randn(2, 2, count) * 0.1)
    assert latents.shape == (2, -(-count // LATENT_HOP), 64)
    assert latents.dtype == torch.float32
    assert codec.decode(latents, count).shape == (2, 2, count)
    assert codec.decode(latents).shape == (2, 2, latents.shape[1] * LATENT_HOP)


def test_encode_doubles_mono(codec: Codec) -> None:
    mono = torch.randn(1, 1, 10000) * 0.1
    assert torch.equal(codec.encode(mono), codec.encode(mono.expand(1, 2, -1)))
    assert torch.equal(codec.encode(mono[0]), codec.encode(mono))


def test_codec_is_deterministic_and_independent_of_the_batch(codec: Codec) -> None:
    samples = torch.randn(3, 2, 3 * LATENT_HOP) * 0.1
    first = codec.encode(samples)
    assert torch.equal(first, codec.encode(samples))
    assert torch.allclose(first[1:2], codec.encode(samples[1:2]), atol=1e-5)
    assert torch.equal(codec.decode(first, griffin_lim=1), codec.decode(first, griffin_lim=1))


def test_encode_with_sample_adds_the_noise_of_the_posterior(codec: Codec) -> None:
    samples = torch.randn(1, 2, 8 * LATENT_HOP) * 0.1
    draw = codec.encode(samples, sample=True, generator=torch.Generator().manual_seed(1))
    again = codec.encode(samples, sample=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw, again)
    noise = (draw - codec.encode(samples)) / codec.latent_scale
    assert 0.1 < noise.std() < 0.18  # the log-variance starts at -4


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (torch.zeros(1, 3, 5000), "shape"),
        (torch.zeros(1, 2, 0), "shape"),
        (torch.full((1, 2, 5000), float("nan")), "NaN"),
    ],
)
def test_encode_rejects_bad_samples(codec: Codec, bad: torch.Tensor, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        codec.encode(bad)


def test_decode_rejects_bad_latents(codec: Codec) -> None:
    good = torch.zeros(1, 4, 64)
    for call in (
        lambda: codec.decode(torch.zeros(1, 4, 63)),
        lambda: codec.decode(good, 4 * LATENT_HOP + 1),
        lambda: codec.decode(good, 0),
        lambda: codec.decode(good, griffin_lim=-1),
    ):
        with pytest.raises(InvalidInputError):
            call()
    with pytest.raises(GenerationError, match="diverged"):
        codec.decode(good * float("inf"))


@torch.inference_mode()
def test_decode_features_stay_within_max_log_magnitude() -> None:
    codec = Codec().eval()
    latents = 20.0 * torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    codec.decoder.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    free = codec.decode_features(latents)
    codec.max_log_magnitude[:, :100] = -1.0
    held = codec.decode_features(latents)
    assert free[:, :, :2, :100].max() > 0.0
    assert held[:, :, :2, :100].max() == -1.0
    assert torch.equal(held[:, :, :, 100:], free[:, :, :, 100:])
    assert torch.equal(held[:, :, 2], free[:, :, 2])


def test_codec_state_keeps_the_names_of_saved_weights() -> None:
    """On disk max_log_magnitude is "ceiling", as in the shipped weights; loading takes that name alone."""
    torch.manual_seed(0)
    codec = Codec(SMALL)
    codec.max_log_magnitude.copy_(torch.randn_like(codec.max_log_magnitude))
    state = codec.state_dict()
    assert torch.equal(state["ceiling"], codec.max_log_magnitude)
    assert "max_log_magnitude" not in state
    loaded = Codec(SMALL)
    assert not torch.equal(loaded.max_log_magnitude, codec.max_log_magnitude)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.max_log_magnitude, codec.max_log_magnitude)
    assert "ceiling" in state  # the caller's dict stays as it is
    wrapped = torch.nn.ModuleDict({"codec": codec})
    assert "codec.ceiling" in wrapped.state_dict()
    torch.nn.ModuleDict({"codec": Codec(SMALL)}).load_state_dict(wrapped.state_dict())
    with pytest.raises(RuntimeError, match="max_log_magnitude"):
        loaded.load_state_dict({name: value for name, value in state.items() if name != "ceiling"})


def test_load_state_of_the_shipped_weights_has_the_saved_names() -> None:
    checkpoint = load_folder("nano")
    assert "ceiling" in checkpoint.parts["codec"]
    codec = load_codec("nano")
    assert torch.equal(codec.max_log_magnitude, checkpoint.parts["codec"]["ceiling"].float())
    assert codec.max_log_magnitude.max() < 20.0


def test_release_decoder_frees_it_and_keeps_the_encoder() -> None:
    codec = Codec(SMALL).eval()
    samples = torch.randn(1, 2, 5000) * 0.1
    latents = codec.encode(samples)
    codec.release_decoder()
    assert torch.equal(codec.encode(samples), latents)
    assert not list(codec.decoder.parameters())
    with pytest.raises(RuntimeError):
        codec.decode(latents)


def test_codec_config_survives_json_and_rejects_unknown_names() -> None:
    assert CodecConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(InvalidInputError, match="widht"):
        CodecConfig.from_dict({"widht": 3})


def test_istft_inverts_stft_exactly(frames: SpectralFrames) -> None:
    samples = torch.randn(2, 7 * LATENT_HOP)
    spectra = frames.stft(samples)
    assert spectra.shape == (2, 28, N_FFT // 2 + 1)
    assert torch.allclose(frames.istft(spectra), samples, atol=1e-5)


def test_stft_of_a_full_scale_sine_has_magnitude_one(frames: SpectralFrames) -> None:
    hz = 100 * SAMPLE_RATE / N_FFT
    time = torch.arange(8 * LATENT_HOP) / SAMPLE_RATE
    assert frames.stft(torch.sin(2 * torch.pi * hz * time))[16].abs().max() == pytest.approx(1.0, abs=1e-3)


def test_features_show_the_pan_of_a_signal(frames: SpectralFrames) -> None:
    source = torch.randn(1, 8 * LATENT_HOP) * 0.1
    features = frames.features(torch.stack([source, 0.25 * source], 1), with_cosine=True)
    assert features.shape == (1, 32, 3, frames.bands)
    loud = features[:, :, 0] > -6.5
    # mid = 0.625 s, side = 0.375 s: in phase, and 4.44 dB = 0.511 nats apart
    assert torch.allclose((features[:, :, 0] - features[:, :, 1])[loud], torch.tensor(0.5108), atol=5e-3)
    assert (features[:, :, 2][loud] > 0.999).all()


def test_spsi_native_equals_reference() -> None:
    if native.lib is None:
        pytest.skip(f"no C++ operators: {native.why}")
    rng = np.random.default_rng(0)
    magnitude = np.abs(rng.normal(size=(2, 30, N_FFT // 2 + 1))).astype(np.float32)
    magnitude[0, 3] = 0.0  # silence, plateaus and edges
    magnitude[1, 4, 100:200] = 1.0
    magnitude[1, 5] = np.arange(magnitude.shape[2])
    magnitude[1, 6] = -np.arange(magnitude.shape[2]) + 2000.0
    phasors = torch.empty(magnitude.shape, dtype=torch.complex64)
    native.lib.spsi(torch.from_numpy(magnitude), phasors, FRAME_HOP, N_FFT)
    reference = spsi_numpy(magnitude, FRAME_HOP, N_FFT)
    assert np.abs(phasors.numpy() - reference).max() < 1e-5
    assert np.allclose(np.abs(reference), 1.0, atol=1e-6)


@pytest.mark.parametrize("hz", [110.0, 441.7, 1234.5, 5005.0])
def test_synthesize_gives_back_a_sine_at_its_pitch(frames: SpectralFrames, hz: float) -> None:
    features = frames.features(tones(1.5, hz, hz)[..., : 32 * LATENT_HOP], with_cosine=True)
    back = frames.synthesize(features, griffin_lim=1)[0, 0]
    exact = hz < 2500  # above, bands are wider than a bin: two at 5 kHz, which smears a lone sine and lowers its level
    assert abs(peak_hz(back) - hz) < (3.0 if exact else 43.0)
    assert back.square().mean() == pytest.approx(0.08, rel=0.25 if exact else 0.5)


def test_synthesize_keeps_the_stereo_image(frames: SpectralFrames) -> None:
    samples = tones(1.5, 440.0, 700.0)[..., : 32 * LATENT_HOP]
    back = frames.synthesize(frames.features(samples, with_cosine=True), griffin_lim=2)[0]
    assert peak_hz(back[0]) == pytest.approx(440.0, abs=3.0)
    assert peak_hz(back[1]) == pytest.approx(700.0, abs=3.0)


def test_synthesize_keeps_silence(frames: SpectralFrames) -> None:
    back = frames.synthesize(frames.features(torch.zeros(1, 2, 8 * LATENT_HOP), with_cosine=True), griffin_lim=2)
    assert back.abs().max() < 1e-5


def test_mel_filters_have_no_empty_row() -> None:
    for count in (40, 80, 160):
        filters = mel_filters(count)
        assert filters.shape == (count, N_FFT // 2 + 1)
        assert (filters.sum(1) > 0.4).all()


def test_decoder_takes_at_most_one_gigaflop_per_audio_second() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    codec = Codec()
    latents = torch.zeros(1, 215, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        codec.decode_features(latents)
    per_second = counter.get_total_flops() / (latents.shape[1] / codec.latent_rate)
    assert 0.3e9 < per_second <= 1.0e9
