"""Key estimation from chroma, and the agreement of an estimate with the requested key.

The score of a key is linear in the square roots of the chroma counted from the key's tonic, so one set of weights
serves all twelve tonics. FITTED is a logistic regression on the rendered training pieces (`fit`); PROFILES are
published key profiles, to which `fit_key` compares it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...conditioning.keys import MODES

NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")

# Weight of each pitch class in major and minor, from the tonic up. Krumhansl and Kessler 1982 (listeners' ratings);
# Temperley 2007, "Kostka-Payne" corpus (frequencies in textbook examples).
PROFILES = {
    "krumhansl": (
        (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
        (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
    ),
    "temperley": (
        (0.748, 0.060, 0.488, 0.082, 0.670, 0.460, 0.096, 0.715, 0.104, 0.366, 0.057, 0.400),
        (0.712, 0.084, 0.474, 0.618, 0.049, 0.460, 0.105, 0.747, 0.404, 0.067, 0.133, 0.330),
    ),
}

# Result of `fit` on 515 ten-second clips of the rendered training split (python -m presto_rt.lab.evaluation.fit_key),
# ridge 1e-3. In five-fold cross-validation it finds 76 % of the keys, Krumhansl's profile 66 %. Per mode: 12 weights of
# chroma from the tonic up, 12 of bass chroma, a constant.
FITTED = (
    (2.93, -1.25, 0.61, -1.14, 2.32, 1.72, -3.49, 2.03, -1.89, -0.42, -3.80, 1.46,
     4.05, -1.10, 0.43, -1.30, 0.70, 1.51, -2.85, 1.86, -1.40, 0.90, -2.53, 0.31, -0.24),
    (2.35, -3.61, 1.71, 2.64, -2.32, 0.11, -1.54, 1.58, 2.46, -3.69, -0.40, 1.63,
     3.79, -2.75, -0.35, -0.21, -1.47, 0.39, -1.50, 1.17, 1.06, -2.42, 0.87, 0.84, 0.24),
)  # fmt: skip


def profile_scores(chroma: np.ndarray, profile: str = "temperley") -> np.ndarray:
    """Pearson correlation of chroma (12,) with the profile of each key: (2, 12), mode then tonic; zeros for silence."""
    chroma = np.asarray(chroma, dtype=np.float64)
    scores = np.zeros((2, 12))
    if chroma.std() < 1e-9:
        return scores
    for mode, weights in enumerate(PROFILES[profile]):
        for tonic in range(12):
            scores[mode, tonic] = np.corrcoef(chroma, np.roll(weights, tonic))[0, 1]
    return scores


def _from_each_tonic(chroma: np.ndarray) -> np.ndarray:
    """Map chroma and bass chroma (2, 12) to (12, 24): for each tonic, their square roots from that tonic up."""
    roots = np.sqrt(np.asarray(chroma, dtype=np.float64))
    return np.stack([np.roll(roots, -tonic, axis=1).reshape(-1) for tonic in range(12)])


def key_scores(chroma: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Score the 24 keys from chroma and bass chroma (2, 12), each summing to 1 or 0: (2, 12), mode then tonic.

    `weights` are (2, 25) as `fit` returns them, FITTED by default. Silence scores zero.
    """
    weights = np.asarray(FITTED if weights is None else weights)
    if not np.asarray(chroma).any():
        return np.zeros((2, 12))
    scores: np.ndarray = weights[:, :24] @ _from_each_tonic(chroma).T + weights[:, 24:]
    return scores


def best_key(scores: np.ndarray) -> tuple[int, str] | None:
    """Return (tonic, mode) of the highest score, or None if all scores are equal (silence)."""
    if not np.ptp(scores) > 0:
        return None
    mode, tonic = np.unravel_index(int(np.argmax(scores)), scores.shape)
    return int(tonic), MODES[mode]


def fit(chromas: Sequence[np.ndarray], keys: Sequence[tuple[int, str]], ridge: float = 1e-3) -> np.ndarray:
    """Fit key weights by multinomial logistic regression over the 24 keys with a quadratic penalty `ridge`.

    Args:
        chromas: chroma and bass chroma (2, 12) of each clip.
        keys: (tonic, mode) of each clip.
        ridge: weight of the penalty.

    Returns:
        (2, 25): per mode, 12 weights of chroma, 12 of bass chroma, and a constant. All tonics share them.
    """
    from scipy.optimize import minimize

    designs = np.stack([_from_each_tonic(c) for c in chromas])  # (n, 12, 24)
    truth = np.array([MODES.index(mode) * 12 + tonic for tonic, mode in keys])
    rows = np.arange(len(truth))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(2, 25)
        logits = np.concatenate([designs @ w[:24] + w[24] for w in weights], 1)  # (n, 24)
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        value = -np.log(p[rows, truth]).mean() + ridge * (weights[:, :24] ** 2).sum()
        p[rows, truth] -= 1.0
        gradient = 2 * ridge * weights
        gradient[:, 24] = 0.0
        for mode in range(2):
            part = p[:, 12 * mode : 12 * mode + 12] / len(truth)
            gradient[mode, :24] += np.einsum("nt,ntf->f", part, designs)
            gradient[mode, 24] += part.sum()
        return float(value), gradient.reshape(-1)

    solution: np.ndarray = minimize(loss, np.zeros(50), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return solution.reshape(2, 25)


def mirex_score(estimate: tuple[int, str], target: tuple[int, str]) -> float:
    """MIREX key score: 1 for the same key, 0.5 a fifth above, 0.3 the relative, 0.2 the parallel key, else 0."""
    (tonic, mode), (target_tonic, target_mode) = estimate, target
    if mode == target_mode:
        return 1.0 if tonic == target_tonic else 0.5 if (tonic - target_tonic) % 12 == 7 else 0.0
    if tonic == target_tonic:
        return 0.2
    relative = (target_tonic + 9) % 12 if target_mode == "major" else (target_tonic + 3) % 12
    return 0.3 if tonic == relative else 0.0
