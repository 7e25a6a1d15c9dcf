"""What differs from patient to patient: stain, density, background and camera pattern."""

from dataclasses import dataclass

import numpy as np

from ctc_ray.phantom.seeding import generator


@dataclass(frozen=True)
class PatientFactors:
    """Multipliers of one patient around the cohort's medians; 1.0 is the typical patient.

    Attributes:
        stain: (3,) multipliers of DAPI, CK and CD45 signal.
        ctc_strength: multiplier of the CK of CTCs, beside `stain`.
        ctc_prevalence: multiplier (before the profile's spread: a standard normal deviate) of the CTC kinds' weights.
        leukocyte_density: multiplier of CK-negative leukocytes and dense regions.
        background: (4,) multipliers of the background of DAPI, CK, CD45 and the extra page.
        vignette_centre: (row, column) of the brightest point as fractions of the field.
        vignette: loss of light at the far corner, as a fraction.
    """

    stain: tuple[float, float, float]
    ctc_strength: float
    ctc_prevalence: float
    leukocyte_density: float
    background: tuple[float, float, float, float]
    vignette_centre: tuple[float, float]
    vignette: float

    @classmethod
    def draw(cls, seed: int, patient: str) -> "PatientFactors":
        """The factors of one patient; the same seed and patient give the same factors."""
        rng = generator(seed, "patient", patient)
        stain = np.exp(rng.normal(0.0, (0.15, 0.15, 0.25)))
        background = np.exp(rng.normal(0.0, 0.2, size=4))
        return cls(
            stain=(float(stain[0]), float(stain[1]), float(stain[2])),
            ctc_strength=float(np.exp(rng.normal(0.0, 0.25))),
            ctc_prevalence=float(rng.standard_normal()),
            leukocyte_density=float(np.exp(rng.normal(0.0, 0.3))),
            background=(float(background[0]), float(background[1]), float(background[2]), float(background[3])),
            vignette_centre=(float(rng.uniform(0.4, 0.6)), float(rng.uniform(0.4, 0.6))),
            vignette=float(rng.uniform(0.1, 0.3)),
        )
