"""Makes the coefficients of Polar Express, a table of train_gpt.py's, and says how close to 1 they come.

    python bench/polar.py [--steps 6] [--lower 0.001] [--safety 0.02] [--cushion 0.02]

A step takes each singular value s of a matrix to a s + b s^3 + c s^5. Its (a, b, c) are those that leave the least
distance from 1 over an interval in which the values are known to be; the next step's interval is what comes out. One
best step after another is the best composition of so many steps (arXiv 2505.16932). The first interval is [lower, 1].

The program prints a row (a, b, c) for each step, ready to paste, and the range that values from `lower` on end in:
exactly, and in bfloat16, where it is measured on matrices of 256 x 256, 128 x 256 and 256 x 128.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import numpy as np
import torch

import train_gpt

Row = tuple[float, float, float]


def value(row: Row, s):
    """What a step makes of singular values."""
    a, b, c = row
    return a * s + b * s**3 + c * s**5


def best_row(low: float, high: float) -> Row:
    """The odd polynomial of degree five that comes closest to 1 over all of [low, high].

    By Remez: the best one is as far from 1 at four points as anywhere, below and above in turn. Two of them are the
    ends of the interval. The others are where its slope is 0, which moves them, until they stay.
    """
    if high - low < 1e-4 * high:  # nearly a point, around which the distance is smaller than float64 tells apart
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    points = np.linspace(low, high, 4)
    for _ in range(100):
        # a s + b s^3 + c s^5 + distance = 1 below, and with - above.
        a, b, c, _ = np.linalg.solve(np.stack((points, points**3, points**5, [1, -1, 1, -1]), axis=1), np.ones(4))
        old = points
        inner = np.sqrt((-3 * b + np.sqrt(9 * b * b - 20 * a * c) * np.array([-1, 1])) / (10 * c))
        points = np.array([low, *sorted(inner), high])
        if np.allclose(points, old, rtol=1e-14, atol=0):
            break
    return float(a), float(b), float(c)


def best_rows(steps: int, lower: float, safety: float, cushion: float) -> list[Row]:
    """The rows of so many steps, for singular values in [lower, 1].

    `safety`: each step but the last expects values up to 1 + safety times as large, since rounding may make them larger
    than they should be. `cushion`: a step does not look below this part of its interval's upper end. That costs it a
    little, but else steps would take some values close to 0, where rounding takes over, on the way.
    """
    rows = []
    low, high = lower, 1.0
    for step in range(steps):
        a, b, c = best_row(max(low, cushion * high), high)
        if low < cushion * high:
            # What was left out comes out lower still: the middle of the whole range goes to 1.
            factor = 2 / (value((a, b, c), low) + value((a, b, c), high))
            a, b, c = a * factor, b * factor, c * factor
        if step < steps - 1:
            stretch = 1 + safety
            a, b, c = a / stretch, b / stretch**3, c / stretch**5
        rows.append((a, b, c))
        low = value(rows[-1], low)
        high = 2 - low
    return rows


def exact_range(rows: list[Row], lower: float) -> tuple[float, float]:
    """The least and the largest of what comes of values in [lower, 1]."""
    s = np.geomspace(lower, 1, 100_001)
    for row in rows:
        s = value(row, s)
    return s.min(), s.max()


def measured_range(rows: list[Row], lower: float, rows_of_matrix: int, columns: int) -> tuple[float, float]:
    """The same of a matrix in bfloat16: the parts of the outcome along the matrix's own singular vectors."""
    rng = np.random.default_rng(0)
    count = min(rows_of_matrix, columns)
    left, right = (np.linalg.qr(rng.standard_normal((size, count)))[0] for size in (rows_of_matrix, columns))
    s = np.geomspace(1, lower / 2, count)
    u = torch.from_numpy((left * s) @ right.T).float()
    outcome = train_gpt.polar_express(u[None], torch.bfloat16, steps=rows)[0].double().numpy()
    parts = np.einsum("rk,rc,ck->k", left, outcome, right)
    parts = parts[s / (1.02 * np.linalg.norm(s)) >= lower]
    return parts.min(), parts.max()


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=command.between(1, 12), default=6, help="rows to make (default: 6)")
    help = "the smallest singular value that has to come close to 1 (default: 0.001)"
    parser.add_argument("--lower", type=float, default=0.001, help=help)
    help = "by how much rounding may enlarge a value (default: 0.02)"
    parser.add_argument("--safety", type=float, default=0.02, help=help)
    help = "the part of an interval that a step does not look at (default: 0.02)"
    parser.add_argument("--cushion", type=float, default=0.02, help=help)
    arguments = parser.parse_args()
    lower = arguments.lower
    if not 1e-6 <= lower <= 0.01:
        raise command.UserError(f"--lower {lower}: must be at least 0.000001, at most 0.01")
    for name in ("safety", "cushion"):
        if not 0 <= vars(arguments)[name] <= 0.1:
            raise command.UserError(f"--{name} {vars(arguments)[name]}: must be at least 0, at most 0.1")
    rows = best_rows(arguments.steps, lower, arguments.safety, arguments.cushion)
    for row in rows:
        print(f"    ({', '.join(map(repr, row))}),")
    low, high = exact_range(rows, lower)
    print(f"from {lower:g} on: {low:.4f} to {high:.4f} exactly")
    torch.set_num_threads(1)
    ranges = [measured_range(rows, lower, *shape) for shape in ((256, 256), (128, 256), (256, 128))]
    lows, highs = zip(*ranges)
    print(f"from {lower:g} on: {min(lows):.4f} to {max(highs):.4f} in bfloat16")


if __name__ == "__main__":
    command.run(main)
