"""Write src/vitrail/data/digits.npz from scikit-learn's copy of the UCI digits (a development-time script).

The 1,797 pictures are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C.
Kaynak, 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0): 8 x 8 pixels of
0..16, ink high.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[1] / "src" / "vitrail" / "data" / "digits.npz"
LICENCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0"
)


def main() -> None:
    digits = load_digits()
    np.savez_compressed(
        TARGET,
        images=digits.images.astype(np.uint8),  # (1797, 8, 8), 0..16
        labels=digits.target.astype(np.uint8),  # (1797,), 0..9
        licence=np.array(LICENCE),
    )
    size = TARGET.stat().st_size
    print(f"{TARGET}: {len(digits.images)} digits, {size} bytes")
    sys.exit(0 if size < 100_000 else "too large to embed: 100 kB is the limit")


if __name__ == "__main__":
    main()
