"""MMA grooves with their common style names, and band arrangements made by MMA.

MMA (Musical MIDI Accompaniment, Bob van der Poel) is the Debian package `mma`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...errors import MissingDependencyError, PrestoError
from .midi import Score, from_bytes
from .theory import Chord

MMA_SECONDS = 120  # timeout; a piece takes less than 1 s


@dataclass(frozen=True)
class Groove:
    """An MMA groove with its style name, beats per bar, tempo range in bpm, and kind of harmony."""

    name: str
    style: str
    beats: int
    slowest: int
    fastest: int
    harmony: str  # "triads", "sevenths" or "blues"


def _table(text: str) -> list[Groove]:
    rows = []
    for line in text.strip().splitlines():
        names, style, beats, slowest, fastest, harmony = (part.strip() for part in line.split(","))
        rows += [Groove(n, style, int(beats), int(slowest), int(fastest), harmony) for n in names.split()]
    return rows


GROOVES = _table("""
    BasicRock casio:Rock1 casio:Rock2 pflib:rock1A,             rock,           4,  90, 160, triads
    50sRock 60sRock casio:60sRock, rock and roll, 4, 110, 176, triads
    SoftRock SoftRock1 casio:PopRock1 casio:PopRock2,           soft rock,      4,  80, 130, triads
    casio:DigitalRock,                                          electronic rock, 4, 100, 150, triads
    pflib:metal1A pflib:metal2A casio:HeavyMetal,               metal,          4, 100, 180, triads
    RockBallad casio:SlowRock,                                  rock ballad,    4,  60,  90, triads
    FolkRock,                                                   folk rock,      4,  90, 140, triads
    BossaNova BossaNova1Sus casio:Serenade,                     bossa nova,     4,  90, 150, sevenths
    Samba,                                                      samba,          4,  95, 170, sevenths
    Salsa,                                                      salsa,          4,  90, 170, sevenths
    ChaCha,                                                     cha-cha,        4, 100, 135, sevenths
    Rhumba,                                                     rumba,          4,  90, 140, sevenths
    Mambo,                                                      mambo,          4, 100, 170, sevenths
    Merengue,                                                   merengue,       4, 110, 170, triads
    Calypso,                                                    calypso,        4,  90, 150, triads
    Beguine Bolero,                                             bolero,         4,  70, 120, triads
    casio:LatinFusion CubanGuitar Son,                          latin,          4,  90, 150, sevenths
    Tango LightTango,                                           tango,          4, 100, 135, triads
    Swing SwingWalk EasySwing,                                  swing,          4, 100, 180, sevenths
    JazzCombo casio:JazzCombo ModernJazz,                       jazz,           4, 100, 180, sevenths
    Bebop FastSwing,                                            fast jazz,      4, 140, 180, sevenths
    SlowJazz NiteJazz MellowJazz casio:SlowSwing,               slow jazz,      4,  60, 100, sevenths
    JazzGuitar GypsyJazz,                                       guitar jazz,    4,  90, 170, sevenths
    BigBand casio:MiddleBigBand casio:FastBigBand,              big band,       4, 100, 180, sevenths
    Dixie Charleston,                                           dixieland jazz, 4, 120, 180, triads
    RagTime,                                                    ragtime,        4,  90, 150, triads
    JazzRock LFusion casio:Fusion,                              jazz fusion,    4,  90, 150, sevenths
    Blues FastBlues casio:Blues,                                blues,          4,  80, 150, blues
    SlowBlues SlowBluesWalk4,                                   slow blues,     4,  60,  90, blues
    CountryBlues,                                               country blues,  4,  80, 130, blues
    BoggieWoggie ShuffleBoggie casio:ShuffleBoogie,             boogie woogie,  4, 110, 170, blues
    CountrySwing SlowCountry HillCountry,                       country,        4,  80, 150, triads
    BlueGrass,                                                  bluegrass,      4, 110, 180, triads
    WesternSwing,                                               western swing,  4, 100, 170, triads
    Folk FolkBallad,                                            folk,           4,  70, 130, triads
    Waltz VieneseWaltz casio:PopWaltz,                          waltz,          3,  80, 180, triads
    CountryWaltz,                                               country waltz,  3,  80, 140, triads
    FrenchWaltz,                                                french waltz,   3, 100, 180, triads
    JazzWaltz FastJazzWaltz casio:JazzWaltz,                    jazz waltz,     3,  90, 170, sevenths
    RockWaltz,                                                  rock waltz,     3,  80, 130, triads
    Ska,                                                        ska,            4, 100, 170, triads
    R&B casio:ModernR&B casio:MellowRB,                         r&b,            4,  70, 115, sevenths
    casio:Soul DSoul casio:SoulPop casio:60sSoul,               soul,           4,  80, 130, sevenths
    BVFunk casio:Funk1 casio:Funk2 Kfunk1A,                     funk,           4,  85, 130, sevenths
    BoneyM casio:DiscoSoul,                                     disco,          4, 105, 135, triads
    casio:House casio:LatinHouse,                               house,          4, 115, 135, triads
    casio:Techno alexis:TeamTechno casio:Rave,                  techno,         4, 120, 160, triads
    casio:Trance1 casio:Trance2 Trance Trance1,                 trance,         4, 120, 150, triads
    casio:Dance1 casio:Dance2 casio:8BeatDance,                 dance,          4, 110, 140, triads
    casio:DancePop1 casio:DancePop2 casio:ElectricPop,          dance pop,      4, 100, 140, triads
    casio:Ambient1 casio:Ambient2 casio:Ambient3,               ambient,        4,  60, 110, triads
    alexis:HipHop casio:Hip-Hop,                                hip-hop,        4,  75, 110, triads
    casio:TripHop,                                              trip hop,       4,  70, 105, triads
    casio:Pop casio:80sPop casio:8BeatPop1 casio:8BeatPop2 8Beat, pop,          4,  80, 140, triads
    casio:60sPop 8beatmotownA Twist,                            sixties pop,    4, 100, 170, triads
    casio:PopShuffle1 casio:PopShuffle2 casio:16Shuffle1,       shuffle,        4,  80, 130, triads
    casio:16Beat1 casio:16Beat2 pflib:16beat1A casio:WorldPop,  pop,            4,  70, 110, triads
    PopBallad Ballad casio:PopBallad casio:8BeatBallad1,        pop ballad,     4,  60,  90, triads
    PianoBallad GuitarBallad StringBallad,                      ballad,         4,  60,  95, triads
    casio:16BeatBallad1 casio:OldieBallad,                      ballad,         4,  60,  90, triads
    PopSpiritual SlowSpiritual Hymn,                            gospel,         4,  60, 110, triads
    Lullaby,                                                    lullaby,        4,  60,  90, triads
    March BWMarch casio:March1 casio:GermanMarch,               march,          4,  90, 130, triads
    Polka casio:Polka Polka1,                                   polka,          4, 100, 150, triads
    Foxtrot QuickStep casio:Foxtrot,                            foxtrot,        4, 110, 180, sevenths
    ShowTune Broadway,                                          show tune,      4,  90, 150, sevenths
    Zydeco,                                                     zydeco,         4, 110, 170, triads
    Desert,                                    world,          4,  80, 130, triads
""")


def check_mma() -> None:
    """Raise MissingDependencyError if the program `mma` is not installed."""
    if shutil.which("mma") is None:
        raise MissingDependencyError("bands are arranged by MMA, which is not installed; run: apt-get install mma")


def arrange(groove: str, chords: list[Chord], *, flats: bool, bpm: int, seed: int) -> Score:
    """Arrange a chord progression with MMA, deterministically for a seed.

    Args:
        groove: name of an MMA groove, which also sets the meter.
        chords: one chord for each bar.
        flats: spell the chords with flats.
        bpm: tempo in quarter notes a minute.
        seed: seed of MMA's random variations.

    Returns:
        Score with times in beats from the first downbeat.

    Raises:
        MissingDependencyError: mma is not installed.
        PrestoError: MMA rejects the chart, or does not finish within 120 s.
    """
    check_mma()
    lines = [f"RndSeed {seed}", f"Tempo {bpm}", f"Groove {groove}"]
    lines += [f"{number} {chord.name(flats)}" for number, chord in enumerate(chords, 1)]
    with tempfile.TemporaryDirectory(prefix="presto-mma-") as folder:
        chart, target = Path(folder, "piece.mma"), Path(folder, "piece.mid")
        chart.write_text("\n".join(lines) + "\n")
        command = ["mma", "-f", str(target), str(chart)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=MMA_SECONDS)
        except subprocess.TimeoutExpired:
            raise PrestoError(
                f"MMA did not finish groove {groove!r} in {MMA_SECONDS} s; repeat the build to continue"
            ) from None
        if result.returncode or not target.is_file():
            reason = (result.stdout.strip().splitlines() or ["no output"])[-1]
            raise PrestoError(f"MMA rejected groove {groove!r}: {reason}")
        return from_bytes(target.read_bytes())
